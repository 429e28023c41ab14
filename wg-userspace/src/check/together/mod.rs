//! Findings about files that are meant to meet.
//!
//! What one end says of itself, the other says of its peer; where they disagree, somebody drops
//! packets without a word. The steps: `ends` (each file, with who owns which address there), `keys`
//! (which peer of which file is which file), then, for files that know each other, `meeting`
//! (whether a handshake can succeed), `ways` (whether packets get through), and `mesh` (what all of
//! them share). Words and lists of sentences are made in `words`.
//!
//! One cause is one finding: a peer whose key is wrong is taken for the end that was probably meant,
//! and an end that is wrong towards all others is said to be wrong once.

mod ends;
mod keys;
mod meeting;
mod mesh;
#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
mod ways;
mod words;

use super::{Finding, Subject};

/// What is worth knowing about `subjects` as ends of the same tunnels, in the order of the files.
/// Places name files by their index in `subjects`.
///
/// A note about a file that is incomplete without others (a peer whose file is not here) is made
/// only if some of the files do know each other.
pub fn together(subjects: &[Subject<'_>]) -> Vec<Finding> {
    if subjects.len() < 2 {
        return Vec::new();
    }
    let ends = ends::ends(subjects);
    let (links, mut findings) = keys::link(&ends);
    meeting::check(&ends, &links, &mut findings);
    let shared = mesh::check(&ends, &links, &mut findings);
    ways::check(&ends, &links, &shared, &mut findings);
    let first = |finding: &Finding| {
        finding.places.first().map_or((0, 0), |place| (place.file, place.span.offset()))
    };
    findings.sort_by(|a, b| first(a).cmp(&first(b)).then(b.severity.cmp(&a.severity)));
    findings
}

/// Two files that know each other, and by which of their peers.
#[derive(Clone, Copy, Debug)]
struct Pair {
    /// Index of a file.
    near: usize,
    /// Index of the other file.
    far: usize,
    /// Index of the peer of `near` that is `far`.
    peer: usize,
    /// Index of the peer of `far` that is `near`.
    back: usize,
}

impl Pair {
    /// The same pair, seen from the other end.
    const fn turned(self) -> Self {
        Self { near: self.far, far: self.near, peer: self.back, back: self.peer }
    }
}
