//! `check`: everything that is wrong with config files, each alone and as ends of the same tunnels,
//! and what `up` would do with them.
//!
//! `crate::check` has the rules that need nothing but the files. What only this host can say is
//! added by [`host`], and left out with `--offline`.

mod files;
mod host;
mod json;
mod text;

use std::{collections::HashMap, path::Path};

use self::files::File;
use super::{Code, Failure, args, down::runtime, print, show, text::Paint};
use crate::check::{self, Finding, Place, Rule, Severity, Subject};

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
/// known about it: one cause, one finding. Errors stay.
fn leave_out_what_is_said_again(alone: &mut Vec<Finding>, together: &[Finding]) {
    let place = |place: &Place| (place.file, place.span.offset());
    let mut by_place: HashMap<(usize, usize), Vec<&Finding>> = HashMap::new();
    for finding in together {
        for at in &finding.places {
            by_place.entry(place(at)).or_default().push(finding);
        }
    }
    alone.retain(|finding| {
        let first = place(&finding.places[0]);
        // Their first place is the value itself, and not what stands for the file.
        let is_of_value = matches!(
            finding.rule,
            Rule::AddressOfPeer
                | Rule::AllowedIpsHostBits
                | Rule::AllowedIpsMissing
                | Rule::EndpointRepeated
        );
        let says_so = |other: &&Finding| {
            let has = |at: &Place| other.places.iter().any(|known| place(known) == place(at));
            let is_same = is_of_value && place(&other.places[0]) == first
                || finding.places.len() > 1 && finding.places.iter().all(has);
            other.severity >= finding.severity && is_same
        };
        finding.severity == Severity::Error
            || !by_place.get(&first).is_some_and(|others| others.iter().any(says_so))
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
        let at = |offset: usize| Span::new(offset.into(), 1);
        let warning = |rule, places: &[usize]| {
            let finding = Finding::new(Severity::Warning, rule, "");
            places.iter().fold(finding, |finding, &offset| finding.at(0, at(offset), ""))
        };
        let error = Finding::new(Severity::Error, Rule::AllowedIpsSame, "").at(0, at(5), "");
        let mut alone = vec![
            warning(Rule::EndpointRepeated, &[1, 2]),
            warning(Rule::AddressOfPeer, &[5]),
            warning(Rule::AllowedIpsMissing, &[2]),
            warning(Rule::AddressMissing, &[5]),
            error.clone(),
        ];
        let together = [warning(Rule::Syntax, &[3, 2, 1]), error];
        leave_out_what_is_said_again(&mut alone, &together);
        let left: Vec<_> = alone.iter().map(|finding| finding.rule).collect();
        let expected = [Rule::AllowedIpsMissing, Rule::AddressMissing, Rule::AllowedIpsSame];
        assert_eq!(left, expected);
        leave_out_what_is_said_again(&mut alone, &[]);
        assert_eq!(alone.len(), 3);
    }
}
