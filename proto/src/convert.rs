//! Wire words to domain values and back. Anything the domain cannot hold is refused with the field's name.
