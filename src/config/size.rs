//! Sizes as people write them: `10G`, `512MiB`, `4096`.

use serde::de::{Deserialize, Deserializer, Error, Visitor};

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

/// Parse a size: digits and a unit. All units are powers of 1024, with or without `B` or `iB`.
///
/// # Errors
///
/// A line that says what is wrong and what would be right.
pub fn parse(text: &str) -> Result<Size, String> {
    let bad = |why: &str| {
        Err(format!(
            "'{text}' is not a size: {why}; write bytes, or a number with K, M, G or T, such as 512M or 10G"
        ))
    };
    let trimmed = text.trim();
    let digits = trimmed.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = trimmed.get(digits.len()..).unwrap_or_default();
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return bad("the unit is unknown"),
    };
    let digits = digits.trim_end();
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return bad("it has no whole number in front of the unit");
    }
    let bytes = digits
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(1 << shift));
    match bytes {
        Some(n) if n <= i64::MAX as u64 => Ok(Size(n)),
        _ => bad("it is larger than any disk can be"),
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SizeVisitor;
        impl Visitor<'_> for SizeVisitor {
            type Value = Size;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a size, such as \"10G\" or 4096")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Size, E> {
                parse(text).map_err(E::custom)
            }

            fn visit_i64<E: Error>(self, bytes: i64) -> Result<Size, E> {
                u64::try_from(bytes)
                    .map(Size)
                    .map_err(|_| E::custom("a size cannot be negative"))
            }

            fn visit_u64<E: Error>(self, bytes: u64) -> Result<Size, E> {
                Ok(Size(bytes))
            }
        }
        deserializer.deserialize_any(SizeVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("1K", 1024),
            ("512MiB", 512 << 20),
            ("10G", 10 << 30),
            ("10 GiB", 10 << 30),
            ("2tb", 2 << 40),
            (" 7b ", 7),
        ] {
            assert_eq!(parse(text), Ok(Size(bytes)), "{text}");
        }
        for (text, why) in [
            ("", "no whole number"),
            ("G", "no whole number"),
            ("-1G", "no whole number"),
            ("1.5G", "no whole number"),
            ("10X", "unit is unknown"),
            ("99999999T", "larger than any disk"),
            ("99999999999999999999999", "larger than any disk"),
        ] {
            let e = parse(text).unwrap_err();
            assert!(e.contains(why), "{text}: {e}");
        }
    }
}
