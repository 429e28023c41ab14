//! Finds the object of the load generator's programs in the kernel, which `tidegate-load` embeds.

use std::env;
use std::path::PathBuf;

fn main() {
    println!("cargo::rerun-if-env-changed=TIDEGATE_LOAD_OBJECT");
    println!("cargo::rerun-if-env-changed=CARGO_TARGET_DIR");
    let object = match env::var_os("TIDEGATE_LOAD_OBJECT") {
        Some(object) => workspace_root().join(object),
        None => target_dir().join("ebpf/tidegate-load.bpf.o"),
    };
    println!("cargo::rerun-if-changed={}", object.display());
    if object.is_file() {
        println!("cargo::rustc-env=TIDEGATE_LOAD_OBJECT_PATH={}", object.display());
    } else {
        println!(
            "cargo::error=the eBPF object {} is missing: run `cargo xtask build-ebpf` first",
            object.display()
        );
    }
}

/// Where `cargo xtask build-ebpf` puts it: as cargo has it, a relative path being relative to the workspace.
fn target_dir() -> PathBuf {
    workspace_root().join(env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into()))
}

fn workspace_root() -> PathBuf {
    let package = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    package.parent().expect("the package lies in the workspace").to_owned()
}
