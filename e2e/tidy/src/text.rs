//! Rules for every committed file, whatever its language: no binaries, nothing of one person's machine, no
//! address of a package registry (mirrors and proxies are the user's setting), and shell scripts that stop at
//! the first error.

use crate::Finding;
use crate::tree::File;

/// Largest file that may be committed, in bytes.
pub const FILE_BYTES: usize = 1 << 20;

/// Absolute folders that exist on one machine only. Spelled in two parts so that this file is clean
/// itself.
const MACHINE_FOLDERS: &[&str] =
    &[concat!("/ro", "ot"), concat!("/ho", "me"), concat!("/wo", "rk"), concat!("/Us", "ers")];

/// The home of the user in our images, the same on every machine.
const IMAGE_HOME: &str = concat!("/ho", "me/nonroot");

/// Hosts of package registries, spelled in two parts as well.
const REGISTRY_HOSTS: &[&str] = &[
    concat!("py", "pi.org"),
    concat!("python", "hosted.org"),
    concat!("index.cra", "tes.io"),
    concat!("static.cra", "tes.io"),
    concat!("cra", "tes.io-index"),
    concat!("proxy.go", "lang.org"),
    concat!("sum.go", "lang.org"),
    concat!("registry.np", "mjs"),
    concat!("rubyge", "ms.org"),
];

/// Files that cargo writes: the lock file names the registry on every line.
const WRITTEN_BY_CARGO: &str = "Cargo.lock";

/// A file that is too large, or that is not text.
pub fn not_source(file: &File) -> Option<Finding> {
    if file.bytes > FILE_BYTES {
        return Some(Finding::whole(&file.path, format!("{} bytes, {FILE_BYTES} allowed", file.bytes)));
    }
    file.text.is_none().then(|| Finding::whole(&file.path, "is not UTF-8 text"))
}

/// Absolute paths of a machine.
pub fn machine_paths(file: &File) -> Vec<Finding> {
    let hits = file.lines().filter(|(_, line)| {
        MACHINE_FOLDERS.iter().any(|folder| names_folder(&line.replace(IMAGE_HOME, ""), folder))
    });
    hits.map(|(number, _)| Finding::at(&file.path, number, "a path of one machine")).collect()
}

/// True when `line` holds the absolute path: at the start of a word, as a whole component. `$x/…`, `a/…` and
/// `…:port/…` are something else.
fn names_folder(line: &str, folder: &str) -> bool {
    line.match_indices(folder).any(|(start, _)| {
        let before = line[..start].chars().next_back();
        let next = line[start + folder.len()..].chars().next();
        let part_of_path = |c: char| c.is_alphanumeric() || "_-.})]*>".contains(c);
        !before.is_some_and(part_of_path) && !next.is_some_and(|c| c.is_alphanumeric() || "_-.".contains(c))
    })
}

/// Addresses of package registries.
pub fn registry_hosts(file: &File) -> Vec<Finding> {
    if file.path == WRITTEN_BY_CARGO {
        return Vec::new();
    }
    let hits = file.lines().filter_map(|(number, line)| {
        let host = REGISTRY_HOSTS.iter().find(|host| line.contains(**host))?;
        Some(Finding::at(&file.path, number, format!("names {host}")))
    });
    hits.collect()
}

/// A shell script without its first three things: bash, what it is for, and an end at the first error. A file
/// to be sourced says both in its first line instead: `# What it is for. Sourced.`
pub fn careless_script(file: &File) -> Vec<Finding> {
    let mut lines = file.lines().map(|(_, line)| line.trim());
    let first = lines.next().unwrap_or_default();
    let is_shell = file.path.ends_with(".sh") || (first.starts_with("#!") && first.ends_with("sh"));
    if !is_shell {
        return Vec::new();
    }
    // A file that others source lives under their options; it says so where it says what it is for.
    if first.strip_prefix("# ").is_some_and(|purpose| purpose.len() > 20 && purpose.contains("Sourced")) {
        return Vec::new();
    }
    let mut findings = Vec::new();
    if !(first.starts_with("#!") && first.ends_with("bash")) {
        findings.push(Finding::at(&file.path, 1, "does not start with a line that names bash"));
    }
    let purpose = lines.next().and_then(|line| line.strip_prefix('#')).unwrap_or_default();
    if purpose.trim().len() < 10 {
        findings.push(Finding::at(&file.path, 2, "no comment that says what the script is for"));
    }
    if lines.find(|line| !line.is_empty() && !line.starts_with('#')) != Some("set -euo pipefail") {
        findings.push(Finding::whole(&file.path, "its first command is not `set -euo pipefail`"));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> File {
        File::from_text("a/b", text)
    }

    #[test]
    fn binaries_and_large_files_are_found() {
        assert_eq!(not_source(&file("text")), None);
        assert!(not_source(&File { path: "a".to_owned(), bytes: 4, text: None }).is_some());
        assert!(
            not_source(&File { path: "a".to_owned(), bytes: FILE_BYTES + 1, text: Some(String::new()) })
                .is_some()
        );
    }

    #[test]
    fn paths_of_a_machine_are_found() {
        for folder in MACHINE_FOLDERS {
            for bad in [format!("cd {folder}/x"), format!("\"{folder}\""), format!("A={folder}/b:c")] {
                assert_eq!(machine_paths(&file(&bad)).len(), 1, "{bad}");
            }
            assert_eq!(machine_paths(&file(&format!("nonroot:{IMAGE_HOME}:"))), []);
            for fine in [
                format!("${{a}}{folder}/x"),
                format!("{folder}fs"),
                format!("a{folder}/x"),
                format!("b.{folder}"),
            ] {
                assert_eq!(machine_paths(&file(&fine)), [], "{fine}");
            }
        }
    }

    #[test]
    fn addresses_of_registries_are_found() {
        for host in REGISTRY_HOSTS {
            let text = format!("fine\nsee https://{host}/a");
            assert_eq!(registry_hosts(&file(&text)).len(), 1, "{host}");
            assert_eq!(registry_hosts(&File::from_text(WRITTEN_BY_CARGO, &text)), []);
        }
    }

    #[test]
    fn careless_scripts_are_found() {
        let good = "#!/usr/bin/env bash\n# Starts the cluster of the tests.\n\nset -euo pipefail\necho\n";
        for (path, text, expected) in [
            ("a.sh", good.to_owned(), 0),
            ("a/run", good.to_owned(), 0),
            ("a.sh", good.replace("bash", "sh"), 1),
            ("a/run", good.replace("bash", "sh"), 1),
            ("a.sh", good.replace("# Starts the cluster of the tests.\n", ""), 1),
            ("a.sh", good.replace("set -euo pipefail\n", ""), 1),
            ("a.sh", good.replace("set -euo pipefail\necho", "echo\nset -euo pipefail"), 1),
            ("a.sh", String::new(), 3),
            ("a.sh", "# How daemons are started. Sourced.\nstart() {\n".to_owned(), 0),
            ("a.sh", "# How daemons are started.\nstart() {\n".to_owned(), 3),
            ("a.md", "text".to_owned(), 0),
        ] {
            assert_eq!(careless_script(&File::from_text(path, &text)).len(), expected, "{path} {text:?}");
        }
    }
}
