//! `check`: everything that is wrong with config files, each alone and as ends of the same tunnels,
//! and what `up` would do with them.
//!
//! `crate::check` has the rules that need nothing but the files. What only this host can say is
//! added by [`host`], and left out with `--offline`.

mod files;
mod host;
mod json;
mod text;

use std::{
    collections::{HashMap, HashSet},
    path::Path,
};

use self::files::File;
use super::{Code, Failure, args, down::runtime, print, show, text::Paint};
use crate::check::{self, Finding, Rule, Severity, Subject};

/// All that was found.
struct Outcome {
    files: Vec<File>,
    /// Those of each file in its order, and then those of files together.
    findings: Vec<Finding>,
    /// Whether there were several files, so that they were compared.
    is_together: bool,
}

pub fn check(arguments: &args::Check) -> Result<Code, Failure> {
    let files = files::read(&arguments.files, Path::exists)?;
    let outcome = look(files, arguments.offline)?;
    let text = match arguments.json {
        true => json::shown(&outcome)?,
        false => text::shown(&outcome, Paint { is_on: show::wants_colour() }, arguments.verbose),
    };
    print(&text)?;
    Ok(match outcome.worst() {
        Some(Severity::Error) => Code::Config,
        Some(Severity::Warning) if arguments.strict => Code::Degraded,
        _ => Code::Ok,
    })
}

fn look(mut files: Vec<File>, is_offline: bool) -> Result<Outcome, Failure> {
    let mut findings = Vec::new();
    for (index, file) in files.iter_mut().enumerate() {
        let mut of_file = std::mem::take(&mut file.findings);
        if let Some(config) = &file.config {
            of_file.extend(files::unsupported(config, index));
            of_file.extend(check::alone(&Subject { name: &file.interface, config }, index));
        }
        findings.push(of_file);
    }
    if is_offline {
        for (file, findings) in files.iter_mut().zip(&findings) {
            host::plan_offline(file, findings)?;
        }
    } else {
        let runtime = runtime()?;
        let facts = runtime.block_on(host::look(&mut files, &mut findings));
        // A name that is still being looked up is not waited for.
        runtime.shutdown_background();
        facts?;
    }
    for findings in &mut findings {
        findings.sort_by_key(|finding| finding.places[0].span.offset());
    }
    let mut findings = findings.concat();

    let (indexes, subjects): (Vec<usize>, Vec<Subject<'_>>) = files
        .iter()
        .enumerate()
        .filter_map(|(index, file)| {
            Some((index, Subject { name: &file.name, config: file.config.as_ref()? }))
        })
        .unzip();
    if subjects.len() > 1 {
        let mut together = check::together(&subjects);
        for place in together.iter_mut().flat_map(|finding| &mut finding.places) {
            place.file = indexes[place.file];
        }
        leave_out_what_is_said_again(&mut findings, &together);
        together.sort_by_key(|finding| {
            let place = &finding.places[0];
            (place.file, place.span.offset())
        });
        findings.append(&mut together);
    }
    let is_together = files.len() > 1;
    Ok(Outcome { files, findings, is_together })
}

/// Takes away from what was found in single files what shows of files together as well, where more is
/// known about it: one cause, one finding.
fn leave_out_what_is_said_again(alone: &mut Vec<Finding>, together: &[Finding]) {
    let place = |finding: &Finding| (finding.places[0].file, finding.places[0].span.offset());
    let mut said = HashMap::new();
    for finding in together {
        let severity = said.entry(place(finding)).or_insert(finding.severity);
        *severity = finding.severity.max(*severity);
    }
    // Who cannot be found, and that this is so, has several places.
    let unreachable: HashSet<usize> = together
        .iter()
        .filter(|finding| matches!(finding.rule, Rule::NobodyStarts | Rule::NoListenPort))
        .flat_map(|finding| finding.places.iter().map(|place| place.file))
        .collect();
    alone.retain(|finding| match finding.rule {
        Rule::ListenPortMissing => !unreachable.contains(&finding.places[0].file),
        Rule::AddressOfPeer
        | Rule::AllowedIpsHostBits
        | Rule::AllowedIpsMissing
        | Rule::AllowedIpsSame
        | Rule::EndpointRepeated => {
            said.get(&place(finding)).is_none_or(|&severity| severity < finding.severity)
        }
        _ => true,
    });
}

impl Outcome {
    fn worst(&self) -> Option<Severity> {
        self.findings.iter().map(|finding| finding.severity).max()
    }

    fn count(&self, severity: Severity) -> usize {
        self.findings.iter().filter(|finding| finding.severity == severity).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Span;

    #[test]
    fn what_files_together_say_is_not_said_of_one_again() {
        let found = |severity, rule, file, offset: usize| {
            Finding::new(severity, rule, "").at(file, Span::new(offset.into(), 1), "")
        };
        use Severity::{Error, Note, Warning};
        let mut alone = vec![
            found(Warning, Rule::EndpointRepeated, 0, 1),
            found(Warning, Rule::EndpointRepeated, 0, 2),
            found(Error, Rule::AllowedIpsSame, 0, 3),
            found(Error, Rule::AllowedIpsSame, 0, 4),
            found(Warning, Rule::MtuTooLarge, 0, 1),
            found(Warning, Rule::ListenPortMissing, 0, 9),
            found(Warning, Rule::ListenPortMissing, 1, 9),
        ];
        let together = [
            found(Warning, Rule::SameEndpoint, 0, 1),
            found(Error, Rule::DroppedSource, 0, 3),
            found(Note, Rule::DroppedSource, 0, 4),
            found(Error, Rule::NobodyStarts, 1, 5),
        ];
        leave_out_what_is_said_again(&mut alone, &together);
        let left: Vec<_> = alone.iter().map(|finding| finding.places[0].span.offset()).collect();
        assert_eq!(left, [2, 4, 1, 9]);
        assert_eq!(alone[3].places[0].file, 0);
        leave_out_what_is_said_again(&mut alone, &[]);
        assert_eq!(alone.len(), 4);
    }
}
