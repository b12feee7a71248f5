//! Little-endian fields at fixed offsets.
//!
//! PostgreSQL writes its files in the byte order of the host; the hosts it is run on are little-endian, and each reader refuses files of
//! the other order by a field of its own (magic, version). Offsets come from layout tables and the caller has checked the length, so a
//! field beyond the end cannot happen; it reads as zero rather than panic.

macro_rules! little_endian {
    ($($name:ident $type:ty),*) => {$(
        /// The value at byte `at`.
        #[inline(always)]
        pub(crate) fn $name(bytes: &[u8], at: usize) -> $type {
            match bytes.get(at..).and_then(|rest| rest.first_chunk()) {
                Some(field) => <$type>::from_le_bytes(*field),
                None => 0,
            }
        }
    )*};
}

little_endian!(u16_at u16, u32_at u32, u64_at u64, i64_at i64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields() {
        let bytes = [1, 2, 3, 4, 5, 6, 7, 0x88, 9];
        assert_eq!(u16_at(&bytes, 1), 0x0302);
        assert_eq!(u32_at(&bytes, 1), 0x0504_0302);
        assert_eq!(u64_at(&bytes, 0), 0x8807_0605_0403_0201);
        assert_eq!(i64_at(&bytes, 1), 0x0988_0706_0504_0302);
        assert_eq!((u16_at(&bytes, 8), u64_at(&bytes, 2), u32_at(&bytes, usize::MAX)), (0, 0, 0));
    }
}
