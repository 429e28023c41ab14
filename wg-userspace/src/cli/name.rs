//! Names of interfaces and their config files, by the rules of wg-quick(8).

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

/// Where the config file of an interface is when only its name is given.
const CONFIG_DIR: &str = "/etc/wireguard";

/// A name that wg-quick(8) accepts for an interface.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct InterfaceName(String);

/// Why a text is no name for an interface.
#[derive(Debug, Eq, PartialEq, thiserror::Error)]
#[error(
    "`{0}` is no name for an interface; take 1 to {max} letters, digits or `_=+.-`",
    max = InterfaceName::LEN_MAX
)]
pub struct NameError(String);

impl InterfaceName {
    /// Bytes that the kernel keeps for a name, without the zero that ends it.
    pub const LEN_MAX: usize = 15;

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for InterfaceName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let is_known = |byte: u8| byte.is_ascii_alphanumeric() || b"_=+.-".contains(&byte);
        let is_good = (1..=Self::LEN_MAX).contains(&text.len())
            && text.bytes().all(is_known)
            // The kernel takes neither for a name.
            && text != "."
            && text != "..";
        if is_good { Ok(Self(text.to_owned())) } else { Err(NameError(text.to_owned())) }
    }
}

impl fmt::Display for InterfaceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why a word of the command line names no config file.
#[derive(Debug, Eq, PartialEq, thiserror::Error)]
pub enum WhichFileError {
    /// The file's name is not made of an interface's name and `.conf`.
    #[error(
        "`{0}` is neither the name of an interface nor a file called NAME.conf; rename the file"
    )]
    NotConf(String),
    /// What stands before `.conf` is no name for an interface.
    #[error(transparent)]
    Name(#[from] NameError),
}

/// An interface with the file that configures it.
#[derive(Debug, Eq, PartialEq)]
pub struct ConfigFile {
    /// The interface.
    pub interface: InterfaceName,
    /// Its file; nobody has looked yet whether it exists.
    pub path: PathBuf,
}

impl ConfigFile {
    /// The file that an interface's name stands for.
    pub fn of(interface: &InterfaceName) -> Self {
        let path = Path::new(CONFIG_DIR).join(format!("{interface}.conf"));
        Self { interface: interface.clone(), path }
    }

    /// Finds out which file `word` means: a bare name stands for a file of `/etc/wireguard`.
    ///
    /// One rule more than wg-quick's: `wg0.conf` could be an interface's name as well, but is
    /// taken for a file of this folder unless `/etc/wireguard/wg0.conf.conf` exists.
    pub fn which(word: &str, exists: impl Fn(&Path) -> bool) -> Result<Self, WhichFileError> {
        if let Ok(interface) = word.parse::<InterfaceName>() {
            let file = Self::of(&interface);
            if !word.ends_with(".conf") || exists(&file.path) {
                return Ok(file);
            }
        }
        let path = PathBuf::from(word);
        let stem = path
            .file_name()
            .and_then(|name| name.to_str())
            .and_then(|name| name.strip_suffix(".conf"))
            .ok_or_else(|| WhichFileError::NotConf(word.to_owned()))?;
        Ok(Self { interface: stem.parse()?, path })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_wg_quick() {
        for good in ["wg0", "a", "office-vpn_2", "x=y+z.w", "fifteen-letters"] {
            assert_eq!(good.parse::<InterfaceName>().unwrap().as_str(), good);
        }
        for bad in ["", ".", "..", "sixteen-letters-", "wg 0", "wg/0", "wg0\n", "wgø", "a:b", "%i"]
        {
            let error = bad.parse::<InterfaceName>().unwrap_err();
            assert!(error.to_string().starts_with(&format!("`{bad}` is no name")), "{error}");
        }
    }

    fn which(word: &str) -> Result<(String, String), WhichFileError> {
        ConfigFile::which(word, |_| false)
            .map(|found| (found.interface.to_string(), found.path.display().to_string()))
    }

    fn both(interface: &str, path: &str) -> Result<(String, String), WhichFileError> {
        Ok((interface.to_owned(), path.to_owned()))
    }

    #[test]
    fn a_bare_name_means_etc_wireguard() {
        assert_eq!(which("wg0"), both("wg0", "/etc/wireguard/wg0.conf"));
    }

    #[test]
    fn a_path_names_its_interface() {
        assert_eq!(which("./wg0.conf"), both("wg0", "./wg0.conf"));
        assert_eq!(which("/tmp/a b/home.conf"), both("home", "/tmp/a b/home.conf"));
        assert_eq!(which("wg0.conf"), both("wg0", "wg0.conf"));
        let twice = ConfigFile::which("wg0.conf", |_| true).unwrap();
        assert_eq!(twice.path, Path::new("/etc/wireguard/wg0.conf.conf"));
    }

    #[test]
    fn other_files_are_refused() {
        assert_eq!(which("./wg0"), Err(WhichFileError::NotConf("./wg0".to_owned())));
        assert_eq!(
            which("/etc/wireguard/"),
            Err(WhichFileError::NotConf("/etc/wireguard/".to_owned()))
        );
        let name = NameError("much-too-long-a-name".to_owned());
        assert_eq!(which("dir/much-too-long-a-name.conf"), Err(WhichFileError::Name(name)));
        assert_eq!(which("dir/.conf"), Err(WhichFileError::Name(NameError(String::new()))));
    }
}
