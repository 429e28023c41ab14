//! `cargo xtask licences`: every dependency has a licence that we may ship under.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    path::Path,
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::workspace::cargo;

/// Licences without copyleft; `deny.toml` has the same list for cargo-deny.
const ALLOWED: &[&str] = &[
    "MIT",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC",
    "Zlib",
    "Unicode-3.0",
];

/// What `fuzz/` may use on top, which nobody gets from us: libFuzzer's own is like BSD's.
const FOR_FUZZING: &str = "NCSA";

/// How the names of a package's files begin that have to go along with it.
const TEXTS: [&str; 5] = ["LICENSE", "LICENCE", "COPYING", "COPYRIGHT", "NOTICE"];

/// Checks all packages in the lock files that this platform builds.
///
/// # Errors
/// If one has another licence: each is named, and whether the daemon ships it.
pub fn check() -> Result<()> {
    let ours = metadata("Cargo.toml")?;
    let shipped = shipped(&ours).context("the graph of dependencies")?;
    let packages = ours["packages"].as_array().context("its packages")?;
    let fuzz = metadata("fuzz/Cargo.toml")?;
    let for_fuzzing = fuzz["packages"].as_array().context("the packages of fuzz")?;
    let known: BTreeSet<_> = packages.iter().map(|package| package["id"].as_str()).collect();
    let for_fuzzing: Vec<_> =
        for_fuzzing.iter().filter(|package| !known.contains(&package["id"].as_str())).collect();
    let mut refused = Vec::new();
    for (package, more) in packages
        .iter()
        .map(|package| (package, ""))
        .chain(for_fuzzing.iter().map(|&package| (package, FOR_FUZZING)))
    {
        let licence = package["license"].as_str().unwrap_or("none");
        if !allowed(licence, more) {
            let id = package["id"].as_str().unwrap_or_default();
            let role = if shipped.contains(id) { "shipped" } else { "for development" };
            refused.push(format!("{} {}: {licence} ({role})", package["name"], package["version"]));
        }
    }
    ensure!(refused.is_empty(), "licences that are not allowed:\n{}", refused.join("\n"));
    println!(
        "licences: {} packages, {} of them shipped, and {} for fuzzing, all allowed",
        packages.len(),
        shipped.len(),
        for_fuzzing.len()
    );
    Ok(())
}

/// The texts that go along with the daemon: who wrote what is linked into it, and on which terms.
/// Each text stands there once, below the packages that have it.
///
/// # Errors
/// If cargo or a package's file cannot be read.
pub fn texts() -> Result<String> {
    let ours = metadata("Cargo.toml")?;
    let shipped = shipped(&ours).context("the graph of dependencies")?;
    let mut list = BTreeSet::new();
    let mut packages_of: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for package in ours["packages"].as_array().context("its packages")? {
        let is_shipped = package["id"].as_str().is_some_and(|id| shipped.contains(id));
        // The workspace's own packages have no source.
        if !is_shipped || package["source"].is_null() {
            continue;
        }
        let text = |key: &str| package[key].as_str().unwrap_or_default();
        let name = format!("{} {}", text("name"), text("version"));
        let folder = Path::new(text("manifest_path")).parent().context("a package's folder")?;
        for entry in
            fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?
        {
            let entry = entry?;
            let file = entry.file_name().to_string_lossy().to_uppercase();
            let is_meant = TEXTS.iter().any(|start| file.starts_with(start));
            if is_meant && entry.file_type()?.is_file() {
                let bytes = fs::read(entry.path())
                    .with_context(|| format!("reading {}", entry.path().display()))?;
                let text = String::from_utf8_lossy(&bytes).trim().replace('\r', "");
                packages_of.entry(text).or_default().insert(name.clone());
            }
        }
        list.insert(format!("{name}: {}", text("license")));
    }
    let mut texts = String::from("What is linked into tidegate, and on which terms.\n\n");
    texts.extend(list.into_iter().map(|line| line + "\n"));
    for (text, packages) in packages_of {
        let packages = packages.into_iter().collect::<Vec<_>>().join(", ");
        texts.push_str(&format!("\n{}\n{packages}\n\n{text}\n", "=".repeat(80)));
    }
    Ok(texts)
}

fn metadata(manifest: &str) -> Result<Value> {
    let target = format!("{}-unknown-linux-gnu", env::consts::ARCH);
    let output = cargo()
        .args(["metadata", "--locked", "--format-version=1", "--filter-platform", &target])
        .args(["--manifest-path", manifest])
        .output()
        .context("running cargo metadata")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "cargo metadata for {manifest}: {said}");
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// What the daemon is built from: its dependencies but those for development.
fn shipped(metadata: &Value) -> Option<BTreeSet<&str>> {
    let nodes: BTreeMap<&str, &Value> = metadata["resolve"]["nodes"]
        .as_array()?
        .iter()
        .filter_map(|node| Some((node["id"].as_str()?, node)))
        .collect();
    let packages = metadata["packages"].as_array()?;
    let daemon = packages.iter().find(|package| package["name"] == "wg-userspace")?;
    let mut shipped = BTreeSet::new();
    let mut waiting = vec![daemon["id"].as_str()?];
    while let Some(id) = waiting.pop() {
        if !shipped.insert(id) {
            continue;
        }
        for dependency in nodes.get(id)?["deps"].as_array()? {
            let kinds = dependency["dep_kinds"].as_array()?;
            if kinds.iter().any(|kind| kind["kind"] != "dev") {
                waiting.push(dependency["pkg"].as_str()?);
            }
        }
    }
    Some(shipped)
}

/// Whether an SPDX expression leaves us a choice that is allowed, or is `more`.
fn allowed(expression: &str, more: &str) -> bool {
    // What cargo took for "or" in its early days.
    let text = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let mut words = text.split_whitespace().peekable();
    let answer = any(&mut words, more);
    answer && words.next().is_none()
}

type Words<'a> = std::iter::Peekable<std::str::SplitWhitespace<'a>>;

fn any(words: &mut Words<'_>, more: &str) -> bool {
    let mut answer = all(words, more);
    while words.next_if_eq(&"OR").is_some() {
        answer |= all(words, more);
    }
    answer
}

fn all(words: &mut Words<'_>, more: &str) -> bool {
    let mut answer = one(words, more);
    while words.next_if_eq(&"AND").is_some() {
        answer &= one(words, more);
    }
    answer
}

fn one(words: &mut Words<'_>, more: &str) -> bool {
    let Some(word) = words.next() else { return false };
    if word == "(" {
        let answer = any(words, more);
        return words.next_if_eq(&")").is_some() && answer;
    }
    if words.next_if_eq(&"WITH").is_some() {
        let exception = words.next().unwrap_or_default();
        return ALLOWED.contains(&format!("{word} WITH {exception}").as_str());
    }
    ALLOWED.contains(&word) || word == more
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_wrote_what_is_shipped_is_named() {
        let texts = texts().unwrap();
        let (list, rest) = texts.split_once(&"=".repeat(80)).unwrap();
        assert!(list.lines().any(|line| line.starts_with("ring ")), "{list}");
        // Neither what is ours, nor what only tests use.
        assert!(!list.contains("wg-userspace") && !list.contains("proptest"), "{list}");
        assert!(rest.contains("Permission is hereby granted") && rest.contains("Apache License"));
        let text = rest.split(&"=".repeat(80)).next().unwrap().lines().skip(2);
        let text = text.collect::<Vec<_>>().join("\n");
        assert_eq!(rest.matches(text.trim()).count(), 1, "a text stands there twice");
    }

    #[test]
    fn a_choice_must_lead_to_an_allowed_licence() {
        for expression in [
            "MIT",
            "MIT OR GPL-3.0-only",
            "MIT/Apache-2.0",
            "(MIT OR Apache-2.0) AND Unicode-3.0",
            "Apache-2.0 WITH LLVM-exception OR Apache-2.0 OR MIT",
            "LGPL-2.1 OR (ISC AND Zlib)",
        ] {
            assert!(allowed(expression, ""), "{expression}");
        }
        for expression in [
            "GPL-2.0",
            "MIT AND GPL-2.0",
            "MPL-2.0",
            "(MIT OR Apache-2.0) AND EUPL-1.2",
            "GPL-2.0 WITH Classpath-exception-2.0",
            "none",
            "",
            "MIT OR",
            "MIT BSD",
        ] {
            let ends_well = expression == "MIT OR";
            assert_eq!(allowed(expression, ""), ends_well, "{expression}");
        }
        assert!(allowed("(MIT OR Apache-2.0) AND NCSA", FOR_FUZZING));
        assert!(!allowed("(MIT OR Apache-2.0) AND NCSA", ""));
        assert!(!allowed("(MIT OR Apache-2.0) AND GPL-2.0", FOR_FUZZING));
    }
}
