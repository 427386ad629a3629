//! Reading a TOML file: errors name the file, the line and the key.

use std::ops::Range;
use std::path::Path;

use super::{ConfigError, raw};

/// A file and its text, to tell lines.
pub struct Source {
    name: String,
    text: String,
}

impl Source {
    /// `file:line: `, for a place in the text.
    pub fn at(&self, span: &Range<usize>) -> String {
        let before = self.text.get(..span.start).unwrap_or(&self.text);
        let line = before.bytes().filter(|&b| b == b'\n').count() + 1;
        format!("{}:{line}: ", self.name)
    }

    /// `file: `
    pub fn whole(&self) -> String {
        format!("{}: ", self.name)
    }
}

/// Read a configuration file.
///
/// # Errors
///
/// It cannot be read, is not TOML, or has a key that is unknown or of the wrong type.
pub fn read(path: &Path) -> Result<(raw::File, Source), ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|e| {
        ConfigError(format!(
            "cannot read the configuration {}: {e}",
            path.display()
        ))
    })?;
    parse(&path.display().to_string(), text)
}

/// Parse the text of a configuration file called `name`.
///
/// # Errors
///
/// As [`read`].
pub fn parse(name: &str, text: String) -> Result<(raw::File, Source), ConfigError> {
    let parsed = toml::from_str(&text);
    let source = Source {
        name: name.into(),
        text,
    };
    match parsed {
        Ok(file) => Ok((file, source)),
        Err(e) => {
            let place = e.span().map_or_else(|| source.whole(), |s| source.at(&s));
            let what = e.message().lines().collect::<Vec<_>>().join(" ");
            Err(ConfigError(format!("{place}{what}")))
        }
    }
}
