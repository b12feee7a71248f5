//! What an answer of an S3 service means, apart from what depends on the operation.

use std::error::Error;
use std::fmt;

use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};

use crate::name::StoreName;
use crate::store::StoreError;

/// A failed attempt: the HTTP status and error code, if an answer came, and what it comes to for the caller.
#[derive(Debug)]
pub(super) struct Fault {
    pub(super) status: Option<u16>,
    code: Option<String>,
    message: Option<String>,
    pub(super) error: StoreError,
}

/// What the service said, as the source of a [`StoreError`].
#[derive(Debug)]
struct Answer {
    operation: &'static str,
    status: u16,
    code: Option<String>,
    message: Option<String>,
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} was answered with status {}", self.operation, self.status)?;
        for part in [&self.code, &self.message].into_iter().flatten() {
            write!(f, ", {part}")?;
        }
        Ok(())
    }
}

impl Error for Answer {}

impl Fault {
    /// A fault that is no answer of the service.
    pub(super) fn of(error: StoreError) -> Self {
        Self { status: None, code: None, message: None, error }
    }

    /// Whether another attempt in a moment may fare better.
    pub(super) fn is_passing(&self) -> bool {
        matches!(self.error, StoreError::Unavailable { .. })
    }

    /// Whether the service says that the key, and not more than the key, is missing.
    pub(super) fn is_missing_key(&self) -> bool {
        self.status == Some(404) && self.code.as_deref() == Some("NoSuchKey")
    }

    /// Whether a refused removal may have to do with a lock: services answer 403, some 400 or 409.
    pub(super) fn may_be_a_lock(&self) -> bool {
        matches!(self.status, Some(400 | 403 | 409))
    }

    /// Whether the answer to a removal speaks of a lock, a retention rule or WORM.
    pub(super) fn names_a_lock(&self) -> bool {
        let texts = [&self.code, &self.message].into_iter().flatten();
        let words = ["lock", "retention", "worm", "legal hold"];
        texts.map(|text| text.to_ascii_lowercase()).any(|text| words.iter().any(|word| text.contains(word)))
    }

    /// Sorts out what the SDK returned.
    pub(super) fn classify<E>(store: &StoreName, operation: &'static str, error: SdkError<E, HttpResponse>) -> Self
    where
        E: ProvideErrorMetadata + Error + Send + Sync + 'static,
    {
        if let SdkError::ServiceError(service) = &error {
            let answer = Answer {
                operation,
                status: service.raw().status().as_u16(),
                code: service.err().code().map(str::to_owned),
                message: service.err().message().map(str::to_owned),
            };
            return Self::of_answer(store, answer);
        }
        let timed_out = match &error {
            SdkError::TimeoutError(_) => true,
            SdkError::DispatchFailure(failure) => failure.is_timeout(),
            _ => false,
        };
        let store = store.clone();
        Self::of(if timed_out {
            StoreError::Timeout { store, operation }
        } else {
            StoreError::Unavailable { store, source: Box::new(error) }
        })
    }

    fn of_answer(store: &StoreName, answer: Answer) -> Self {
        let (status, code, message) = (answer.status, answer.code.clone(), answer.message.clone());
        let store = store.clone();
        let error = match (status, code.as_deref().unwrap_or_default()) {
            (_, "NoSuchBucket") | (301 | 302 | 307 | 308, _) | (_, "AuthorizationHeaderMalformed") => {
                let reason = format!("{answer}: check endpoint, region and bucket");
                StoreError::Refused { store, reason }
            }
            (507, _) | (_, "QuotaExceeded" | "InsufficientCapacity" | "XMinioStorageFull") => {
                StoreError::Full { store }
            }
            (401 | 403, _) => StoreError::Denied { store, source: Box::new(answer) },
            (405 | 411 | 501, _) => StoreError::Unsupported { store, reason: answer.to_string() },
            // What the operation must decide (404, 409, 412, 416), what passes (408, 429, 5xx), and what was damaged
            // on its way (400 BadDigest and the like).
            (404 | 408 | 409 | 412 | 416 | 429 | 500.., _)
            | (_, "RequestTimeout" | "BadDigest" | "IncompleteBody" | "XAmzContentSHA256Mismatch") => {
                StoreError::Unavailable { store, source: Box::new(answer) }
            }
            _ => StoreError::Unsupported { store, reason: answer.to_string() },
        };
        Self { status: Some(status), code, message, error }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_and_codes_become_decisions() {
        let fault = |status, code: &str| {
            let code = Some(code.to_owned()).filter(|code| !code.is_empty());
            Fault::of_answer(&"s3".parse().unwrap(), Answer { operation: "put", status, code, message: None })
        };
        let check = |status, code: &str, expected: fn(&StoreError) -> bool| {
            let fault = fault(status, code);
            assert!(expected(&fault.error), "{status} {code}: {:?}", fault.error);
        };
        check(404, "NoSuchBucket", |e| matches!(e, StoreError::Refused { .. }));
        check(301, "PermanentRedirect", |e| matches!(e, StoreError::Refused { .. }));
        check(400, "AuthorizationHeaderMalformed", |e| matches!(e, StoreError::Refused { .. }));
        check(403, "AccessDenied", |e| matches!(e, StoreError::Denied { .. }));
        check(403, "SignatureDoesNotMatch", |e| matches!(e, StoreError::Denied { .. }));
        check(403, "QuotaExceeded", |e| matches!(e, StoreError::Full { .. }));
        check(501, "NotImplemented", |e| matches!(e, StoreError::Unsupported { .. }));
        check(400, "InvalidArgument", |e| matches!(e, StoreError::Unsupported { .. }));
        check(503, "SlowDown", |e| matches!(e, StoreError::Unavailable { .. }));
        check(500, "", |e| matches!(e, StoreError::Unavailable { .. }));
        check(400, "BadDigest", |e| matches!(e, StoreError::Unavailable { .. }));
        assert!(fault(404, "NoSuchKey").is_missing_key());
        assert!(!fault(404, "").is_missing_key());
        assert!(!fault(403, "NoSuchKey").is_missing_key());
        assert!(fault(403, "ObjectLocked").names_a_lock() && fault(403, "AccessDenied").may_be_a_lock());
        assert!(!fault(403, "AccessDenied").names_a_lock() && !fault(503, "SlowDown").may_be_a_lock());
        assert!(fault(409, "ConditionalRequestConflict").is_passing());
        assert!(!fault(403, "AccessDenied").is_passing());
    }
}
