//! `completions`: what a shell completes behind `tidegate`.

use clap_complete::Shell;

use super::{Code, Failure, args, print};

pub fn completions(shell: Shell) -> Result<Code, Failure> {
    let mut script = Vec::new();
    let [mut tidegate, _] = args::definitions().map(|command| visible(&command));
    clap_complete::generate(shell, &mut tidegate, "tidegate", &mut script);
    print(&String::from_utf8(script).expect("made of text"))?;
    Ok(Code::Ok)
}

/// The same command without what is hidden, which `clap_complete` would offer.
fn visible(command: &clap::Command) -> clap::Command {
    // A command keeps names for as long as the process, which ends after this.
    let keep = |name: &str| -> &'static str { name.to_owned().leak() };
    clap::Command::new(keep(command.get_name()))
        .about(command.get_about().cloned().unwrap_or_default())
        .version(command.get_version().map(keep))
        .visible_aliases(command.get_visible_aliases().map(keep))
        .args(command.get_arguments().filter(|argument| !argument.is_hide_set()))
        .subcommands(
            command.get_subcommands().filter(|command| !command.is_hide_set()).map(visible),
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_hidden_is_not_offered() {
        let [tidegate, _] = args::definitions();
        assert!(tidegate.find_subcommand("data").is_some());
        let shown = visible(&tidegate);
        assert!(shown.find_subcommand("data").is_none());
        let run = shown.find_subcommand("run").unwrap();
        assert!(run.get_arguments().any(|argument| argument.get_id() == "foreground"));
        assert!(run.get_arguments().all(|argument| argument.get_id() != "background_child"));
        visible(&tidegate).debug_assert();
    }
}
