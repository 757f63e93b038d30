//! What every Cargo.toml must say: the workspace's lints and package fields, and no version of its own. One
//! version and one feature set for each dependency, so that a crate built alone compiles what the whole
//! workspace compiles.
//!
//! Manifests here are plain: a line-wise reading is enough and needs no TOML parser among the dependencies.

use crate::Finding;
use crate::rust::{self, Rust};
use crate::tree::File;

/// Package fields that are the workspace's.
const INHERITED: &[&str] = &["version", "edition", "rust-version", "license", "repository", "publish"];

/// Dependencies that only code outside of the package mentions: package, dependency, where it is used.
pub const USED_UNSEEN: &[(&str, &str, &str)] = &[
    ("trustformers-proto", "prost", "code that tonic-prost-build generates"),
    ("trustformers-proto", "tonic-prost", "code that tonic-prost-build generates"),
    ("trustformers-runtime", "opentelemetry-proto", "the collector of telemetry's tests"),
    ("trustformers-runtime", "prost", "the collector of telemetry's tests"),
    ("trustformers-serve", "axum", "the collector of telemetry's tests"),
    ("trustformers-serve", "opentelemetry-proto", "the collector of telemetry's tests"),
];

/// A line of a manifest with the section that it stands in.
struct Entry<'a> {
    line: usize,
    section: &'a str,
    key: &'a str,
    value: &'a str,
}

fn entries(manifest: &File) -> Vec<Entry<'_>> {
    let mut section = "";
    let mut found = Vec::new();
    for (line, text) in manifest.lines() {
        let text = text.trim();
        if let Some(name) = text.strip_prefix('[').and_then(|rest| rest.split(']').next()) {
            section = name;
            found.push(Entry { line, section, key: "", value: "" });
        } else if let Some((key, value)) = text.split_once('=').filter(|_| !text.starts_with('#')) {
            found.push(Entry { line, section, key: key.trim(), value: value.trim() });
        }
    }
    found
}

fn is_dependency_section(section: &str) -> bool {
    section.split('.').any(|part| matches!(part, "dependencies" | "dev-dependencies" | "build-dependencies"))
}

/// Names of the dependencies that a member's manifest lists, with their lines.
fn dependencies(manifest: &File) -> Vec<(usize, &str)> {
    let listed = entries(manifest).into_iter().filter(|entry| is_dependency_section(entry.section));
    let named = listed.filter_map(|entry| {
        let name = entry.key.split('.').next().unwrap_or_default().trim_matches('"');
        (!name.is_empty()).then_some((entry.line, name))
    });
    named.collect()
}

/// A member's manifest that does not take lints or package fields from the workspace.
pub fn not_inherited(manifest: &File) -> Vec<Finding> {
    let entries = entries(manifest);
    let has = |section: &str, key: &str| {
        entries.iter().any(|entry| entry.section == section && entry.key == key && entry.value == "true")
    };
    let mut findings = Vec::new();
    if !has("lints", "workspace") {
        findings.push(Finding::whole(&manifest.path, "does not have `[lints] workspace = true`"));
    }
    for field in INHERITED {
        if !has("package", &format!("{field}.workspace")) {
            findings
                .push(Finding::whole(&manifest.path, format!("does not have `{field}.workspace = true`")));
        }
    }
    findings
}

/// Dependencies of a member that do not come from the workspace's table.
pub fn own_versions(manifest: &File) -> Vec<Finding> {
    let wrong = |entry: &Entry<'_>| {
        let inherited = (entry.key.ends_with(".workspace") && entry.value == "true")
            || (entry.value.starts_with('{') && entry.value.replace(' ', "").contains("workspace=true"));
        is_dependency_section(entry.section) && !entry.key.is_empty() && !inherited
    };
    // `[dependencies.name]` hides its keys from this reading; the one spelling is `name.workspace = true`.
    let table = |entry: &Entry<'_>| {
        let last = entry.section.rsplit('.').next().unwrap_or_default();
        entry.key.is_empty() && is_dependency_section(entry.section) && !last.ends_with("dependencies")
    };
    let entries = entries(manifest);
    let found = entries.iter().filter(|entry| wrong(entry) || table(entry));
    found.map(|entry| Finding::at(&manifest.path, entry.line, "is not `name.workspace = true`")).collect()
}

/// Dependencies that no source file of the package mentions.
pub fn unused(package: &str, manifest: &File, sources: &[&Rust<'_>]) -> Vec<Finding> {
    let mentioned = |name: &str| {
        let word = name.replace('-', "_");
        sources.iter().any(|source| source.lines.iter().any(|line| rust::has_word(&line.code, &word)))
    };
    let unseen = |name: &str| USED_UNSEEN.iter().any(|(of, what, _)| *of == package && *what == name);
    let idle = dependencies(manifest).into_iter().filter(|(_, name)| !mentioned(name) && !unseen(name));
    idle.map(|(line, name)| Finding::at(&manifest.path, line, format!("nothing uses {name}"))).collect()
}

/// Entries of the workspace's table that no member uses.
pub fn idle_in_table(root: &File, members: &[&File]) -> Vec<Finding> {
    let used: Vec<&str> =
        members.iter().flat_map(|member| dependencies(member)).map(|(_, name)| name).collect();
    let table = entries(root).into_iter().filter(|entry| entry.section == "workspace.dependencies");
    let idle = table.filter(|entry| !entry.key.is_empty() && !used.contains(&entry.key));
    idle.map(|entry| Finding::at(&root.path, entry.line, format!("no crate uses {}", entry.key))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "[package]\nname = \"a\"\nversion.workspace = true\nedition.workspace = true\n\
        rust-version.workspace = true\nlicense.workspace = true\nrepository.workspace = true\n\
        publish.workspace = true\n\n[lints]\nworkspace = true\n\n[dependencies]\nserde.workspace = true\n\
        rand = { workspace = true }\n";

    fn manifest(text: &str) -> File {
        File::from_text("a/Cargo.toml", text)
    }

    #[test]
    fn a_manifest_that_inherits_is_fine() {
        assert_eq!(not_inherited(&manifest(GOOD)), []);
        assert_eq!(own_versions(&manifest(GOOD)), []);
    }

    #[test]
    fn missing_inheritance_is_found() {
        let bad = GOOD
            .replace("[lints]\nworkspace = true", "")
            .replace("edition.workspace = true", "edition = \"2024\"");
        assert_eq!(not_inherited(&manifest(&bad)).len(), 2);
        let elsewhere = GOOD.replace("[lints]", "[features]");
        assert_eq!(not_inherited(&manifest(&elsewhere)).len(), 1);
    }

    #[test]
    fn versions_outside_the_table_are_found() {
        for bad in [
            "[dependencies]\nserde = \"1\"\n",
            "[dev-dependencies]\nserde = { version = \"1\" }\n",
            "[target.'cfg(unix)'.dependencies]\nlibc = \"1\"\n",
            "[dependencies.serde]\nworkspace = true\n",
        ] {
            assert!(!own_versions(&manifest(bad)).is_empty(), "{bad}");
        }
    }

    #[test]
    fn unused_dependencies_are_found() {
        let source = File::from_text("a/src/lib.rs", "//! serde in prose does not count.\nuse rand::Rng;\n");
        let parsed = Rust::parse(&source).unwrap();
        let found = unused("a", &manifest(GOOD), &[&parsed]);
        assert_eq!(found, [Finding::at("a/Cargo.toml", 14, "nothing uses serde")]);
        let generated = manifest("[dependencies]\nprost.workspace = true\n");
        assert_eq!(unused("trustformers-proto", &generated, &[&parsed]), []);
        assert_eq!(unused("a", &generated, &[&parsed]).len(), 1);
    }

    #[test]
    fn idle_entries_of_the_table_are_found() {
        let root = File::from_text(
            "Cargo.toml",
            "[workspace.dependencies]\nserde = \"1\"\nrand = \"1\"\nold = \"1\"\n",
        );
        let found = idle_in_table(&root, &[&manifest(GOOD)]);
        assert_eq!(found, [Finding::at("Cargo.toml", 4, "no crate uses old")]);
    }
}
