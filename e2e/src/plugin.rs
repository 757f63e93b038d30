//! `kubectl trustformers` as users have it: kubectl finds the program that was built with the scenarios.

use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::{cluster::Cluster, command::Invocation};

/// The plugin's program.
const PROGRAM: &str = "kubectl-trustformers";

/// Prepares `kubectl trustformers ARGUMENTS`.
///
/// # Errors
/// When the program was not built.
pub fn plugin(cluster: &Cluster, arguments: &[&str]) -> Result<Invocation> {
    let folder = folder()?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::iter::once(folder).chain(std::env::split_paths(&path));
    let path = std::env::join_paths(folders)?;
    Ok(cluster.kubectl(&[&["trustformers"][..], arguments].concat()).env("PATH", path))
}

/// The folder of the built programs: tests are in a folder below it.
fn folder() -> Result<PathBuf> {
    let test = std::env::current_exe()?;
    let above = test.ancestors().skip(1).take(2);
    above.map(std::path::Path::to_owned).find(|folder| folder.join(PROGRAM).is_file()).with_context(|| {
        format!("{PROGRAM} is not beside {}: cargo test --profile ci --workspace --no-run", test.display())
    })
}
