//! The names: sections, keys and directives, and what somebody may have meant by another word.

/// A section of the file.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Section {
    Interface,
    Peer,
}

/// Names of one kind, each with the section in which it stands.
macro_rules! names {
    ($(#[$doc:meta])* $kind:ident { $($section:ident { $($name:ident)* })* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
        #[allow(
            clippy::enum_variant_names,
            clippy::upper_case_acronyms,
            reason = "the names are those of the file"
        )]
        pub(super) enum $kind { $($($name,)*)* }

        impl $kind {
            pub const ALL: &[Self] = &[$($(Self::$name,)*)*];

            pub const fn name(self) -> &'static str {
                match self { $($(Self::$name => stringify!($name),)*)* }
            }

            pub const fn section(self) -> Section {
                match self { $($(Self::$name => Section::$section,)*)* }
            }

            /// Reads a name of either case; wg(8) ignores white space in it, too.
            pub fn find(text: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|known| is_same(text, known.name()))
            }

            /// The name that `text` may be meant to be, those of `section` first.
            pub fn nearest(text: &str, section: Section) -> Option<Self> {
                let own = |known: &Self| known.section() == section;
                let (own, other): (Vec<_>, Vec<_>) = Self::ALL.iter().copied().partition(own);
                nearest(text, own.into_iter().chain(other), Self::name)
            }
        }
    };
}

names! {
    /// A key of wg(8) or wg-quick(8).
    Key {
        Interface {
            PrivateKey ListenPort FwMark
            Address DNS MTU Table PreUp PostUp PreDown PostDown SaveConfig
        }
        Peer { PublicKey PresharedKey AllowedIPs Endpoint PersistentKeepalive }
    }
}

names! {
    /// A key of our own, in a `#!` line.
    Directive {
        Interface { Endpoint Xdp Workers MssClamp CopyDscp Nat Forward Allow Metrics Dashboard }
        Peer { Name Limit }
    }
}

impl Section {
    const ALL: [Self; 2] = [Self::Interface, Self::Peer];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Interface => "Interface",
            Self::Peer => "Peer",
        }
    }

    pub fn find(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|known| is_same(text, known.name()))
    }

    pub fn nearest(text: &str) -> Option<Self> {
        nearest(text, Self::ALL, Self::name)
    }
}

impl Key {
    /// Whether its value must never be shown.
    pub const fn is_secret(self) -> bool {
        matches!(self, Self::PrivateKey | Self::PresharedKey)
    }

    /// Whether it may stand in a section more than once.
    pub const fn repeats(self) -> bool {
        matches!(
            self,
            Self::Address
                | Self::DNS
                | Self::PreUp
                | Self::PostUp
                | Self::PreDown
                | Self::PostDown
                | Self::AllowedIPs
        )
    }

    /// Whether its value may be empty.
    pub const fn may_be_empty(self) -> bool {
        self.repeats()
    }
}

impl Directive {
    /// Whether it may stand in a section more than once.
    pub const fn repeats(self) -> bool {
        matches!(self, Self::Nat | Self::Forward | Self::Allow)
    }

    /// Whether this version follows it.
    pub const fn is_built(self) -> bool {
        matches!(
            self,
            Self::Endpoint
                | Self::Xdp
                | Self::Workers
                | Self::MssClamp
                | Self::CopyDscp
                | Self::Nat
                | Self::Forward
                | Self::Allow
                | Self::Name
        )
    }
}

fn is_same(text: &str, name: &str) -> bool {
    let letters = || text.chars().filter(|c| !c.is_whitespace()).map(|c| c.to_ascii_lowercase());
    letters().eq(name.chars().map(|c| c.to_ascii_lowercase()))
}

/// The one of these words that `text` may be meant to be.
pub(super) fn nearest_word(text: &str, known: &[&'static str]) -> Option<&'static str> {
    nearest(text, known.iter().copied(), |word| word)
}

/// The known name with the fewest edits, if they are few for its length.
fn nearest<T: Copy>(
    text: &str,
    known: impl IntoIterator<Item = T>,
    name: impl Fn(T) -> &'static str,
) -> Option<T> {
    /// Longer than any name with its greatest number of edits: not worth comparing.
    const LEN_MAX: usize = 32;
    if text.len() > LEN_MAX {
        return None;
    }
    let distance = |known| edits(&text.to_ascii_lowercase(), &name(known).to_ascii_lowercase());
    known
        .into_iter()
        .map(|known| (distance(known), known))
        .filter(|&(distance, known)| distance <= name(known).len().div_ceil(3).min(3))
        .min_by_key(|&(distance, _)| distance)
        .map(|(_, known)| known)
}

/// Characters to insert, remove, replace or swap with their neighbour to make `b` of `a`.
fn edits(a: &str, b: &str) -> usize {
    let (a, b): (Vec<_>, Vec<_>) = (a.chars().collect(), b.chars().collect());
    let mut rows = vec![vec![0; b.len() + 1]; a.len() + 1];
    for i in 0..=a.len() {
        for j in 0..=b.len() {
            rows[i][j] = if i == 0 || j == 0 {
                i + j
            } else {
                let replaced = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
                let least = replaced.min(rows[i - 1][j] + 1).min(rows[i][j - 1] + 1);
                let swapped = i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1];
                if swapped { least.min(rows[i - 2][j - 2] + 1) } else { least }
            };
        }
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_whatever_their_case() {
        assert_eq!(Key::find("privatekey"), Some(Key::PrivateKey));
        assert_eq!(Key::find("ALLOWED IPS"), Some(Key::AllowedIPs));
        assert_eq!(Key::find("allowedip"), None);
        assert_eq!(Section::find("PEER"), Some(Section::Peer));
        assert_eq!(Directive::find("xdp"), Some(Directive::Xdp));
    }

    #[test]
    fn a_misspelt_name_is_guessed_and_nonsense_is_not() {
        let guess = |text| Key::nearest(text, Section::Interface);
        assert_eq!(guess("Adress"), Some(Key::Address));
        assert_eq!(guess("PirvateKey"), Some(Key::PrivateKey));
        assert_eq!(guess("ListenPorts"), Some(Key::ListenPort));
        assert_eq!(guess("AllowedIP"), Some(Key::AllowedIPs));
        assert_eq!(guess("Masquerade"), None);
        assert_eq!(guess(""), None);
        assert_eq!(Section::nearest("Peers"), Some(Section::Peer));
        assert_eq!(Directive::nearest("Nta", Section::Interface), Some(Directive::Nat));
        assert_eq!(edits("abcd", "acbd"), 1);
        assert_eq!(edits("", "abc"), 3);
    }
}
