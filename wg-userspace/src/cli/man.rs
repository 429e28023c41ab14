//! `man`: the manual's pages, one for each command, made of the same words as `--help`.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::Path,
};

use anyhow::Context as _;
use clap::Command;
use clap_mangen::{
    Man,
    roff::{Roff, bold, roman},
};

use super::{Code, Failure, args};

/// System administration.
const SECTION: &str = "8";

/// Files that people may look for; `NAME` is an interface's.
const FILES: [(&str, &str); 4] = [
    ("/etc/wireguard/NAME.conf", "The config file of an interface."),
    ("/run/tidegate/NAME.state", "What `tidegate up` did, so that `tidegate down` can undo it."),
    (
        "/run/tidegate/NAME.nat",
        "The socket at which `tidegate` reaches who carries out lines about NAT.",
    ),
    ("/var/run/wireguard/NAME.sock", "The socket at which wg(8) reaches the daemon."),
];

/// Variables that no option stands for, the commands that read them, and what they do.
const VARIABLES: [(&str, &[&str], &str); 4] = [
    (
        "WG_ENDPOINT_RESOLUTION_RETRIES",
        &["up", "reload"],
        "How often a name that cannot be resolved is tried again, or `infinity`; 15 by default.",
    ),
    ("WG_PROCESS_FOREGROUND", &["run"], "If 1, the daemon stays in the foreground."),
    ("WG_HIDE_KEYS", &["show"], "If `never`, secret keys are shown."),
    (
        "WG_COLOR_MODE",
        &["show", "check", "trace"],
        "`always`, `never` or `auto`: whether output has colours.",
    ),
];

pub fn man(dir: &Path) -> Result<Code, Failure> {
    fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    for command in args::definitions() {
        let mut command = command.disable_help_subcommand(true);
        command.build();
        write_all(&command, dir)?;
    }
    Ok(Code::Ok)
}

/// The pages of a command and of those below it.
fn write_all(command: &Command, dir: &Path) -> Result<(), Failure> {
    let path = dir.join(format!("{}.{SECTION}", name(command)));
    let doing = || format!("writing {}", path.display());
    let mut file = BufWriter::new(File::create(&path).with_context(doing)?);
    page(command, &mut file).and_then(|()| file.flush()).with_context(doing)?;
    visible(command).try_for_each(|below| write_all(below, dir))
}

/// `tidegate-up`
fn name(command: &Command) -> &str {
    command.get_display_name().unwrap_or_else(|| command.get_name())
}

fn visible(command: &Command) -> impl Iterator<Item = &Command> {
    command.get_subcommands().filter(|command| !command.is_hide_set())
}

fn page(command: &Command, out: &mut dyn Write) -> io::Result<()> {
    let version = env!("CARGO_PKG_VERSION");
    let man = Man::new(command.clone())
        .section(SECTION)
        .source(format!("Tidegate {version}"))
        .manual("Tidegate");
    man.render_title(out)?;
    man.render_name_section(out)?;
    man.render_synopsis_section(out)?;
    man.render_description_section(out)?;
    if command.get_arguments().any(|argument| !argument.is_hide_set()) {
        man.render_options_section(out)?;
    }
    if visible(command).next().is_some() {
        man.render_subcommands_section(out)?;
    }
    let mut rest = Roff::new();
    // `0 ok`, and so on.
    let codes = args::EXIT_CODES.split_once(": ").map_or(args::EXIT_CODES, |(_, codes)| codes);
    let codes = codes.split(" · ").filter_map(|code| code.split_once(' '));
    section(&mut rest, "EXIT STATUS", codes);
    section(&mut rest, "ENVIRONMENT", variables(command));
    section(&mut rest, "FILES", FILES);
    rest.control("SH", ["SEE ALSO"]);
    let see = see_also(command).into_iter().map(|page| format!("{page}({SECTION})"));
    rest.text([roman(see.collect::<Vec<_>>().join(", "))]);
    rest.to_writer(out)
}

fn section<'a>(page: &mut Roff, title: &str, rows: impl IntoIterator<Item = (&'a str, &'a str)>) {
    let mut rows = rows.into_iter().peekable();
    if rows.peek().is_none() {
        return;
    }
    page.control("SH", [title]);
    for (what, text) in rows {
        page.control("TP", []);
        page.text([bold(what)]);
        page.text([roman(text)]);
    }
}

/// What a command, or one below it, reads from the environment.
fn variables(command: &Command) -> Vec<(&'static str, &'static str)> {
    let is_read = |names: &[&str]| {
        let is_named = |word: &str| names.contains(&word);
        // `tidegated` is `tidegate run`.
        name(command)
            .split('-')
            .any(|word| is_named(if word == "tidegated" { "run" } else { word }))
            || visible(command).any(|below| is_named(below.get_name()))
    };
    let read = VARIABLES.iter().filter(|(_, names, _)| is_read(names));
    read.map(|&(variable, _, text)| (variable, text)).collect()
}

fn see_also(command: &Command) -> Vec<String> {
    let own = name(command);
    let mut pages: Vec<String> = match own {
        "tidegate" => vec!["tidegated".to_owned()],
        _ => vec!["tidegate".to_owned()],
    };
    pages.extend(visible(command).map(|below| name(below).to_owned()));
    pages.extend(["wg".to_owned(), "wg-quick".to_owned()]);
    pages
}
