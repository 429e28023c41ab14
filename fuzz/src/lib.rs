//! The fuzz targets for libFuzzer. Their bodies are the daemon's tests' as well, and live there.

use std::{env, fs, path::PathBuf};

#[path = "../../wg-userspace/tests/fuzz/targets/mod.rs"]
pub mod targets;

/// The program of one target.
#[macro_export]
macro_rules! program {
    ($name:ident) => {
        libfuzzer_sys::fuzz_target!(
            init: $crate::write_seeds(stringify!($name)),
            |data: &[u8]| $crate::targets::$name::run(data)
        );
    };
}

/// Writes the seeds of a target into the folder that `TIDEGATE_FUZZ_SEEDS` names, if it names one:
/// libFuzzer reads it afterwards.
pub fn write_seeds(name: &str) {
    let Some(folder) = env::var_os("TIDEGATE_FUZZ_SEEDS").map(PathBuf::from) else { return };
    let target = targets::TARGETS.iter().find(|target| target.name == name).expect("a target");
    for (number, seed) in (target.seeds)().into_iter().enumerate() {
        fs::write(folder.join(format!("seed-{number}")), seed).expect("the folder is there");
    }
}
