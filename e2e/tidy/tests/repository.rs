//! The rules applied to this repository: one test a rule, each with what to do about a finding.

use std::collections::BTreeMap;

use cargo_metadata::{Metadata, MetadataCommand};
use trustformers_tidy::rust::Rust;
use trustformers_tidy::tree::{self, File};
use trustformers_tidy::{
    Finding, boundaries, comments, edges, hygiene, manifests, names, reach, shape, text,
};

/// The input of the rules. Each test reads it again, in some tens of milliseconds.
struct Repository {
    files: Vec<File>,
    metadata: Metadata,
}

impl Repository {
    fn read() -> Self {
        let root = tree::root();
        let files = tree::read(&root).unwrap_or_else(|error| panic!("{error}"));
        let manifest = root.join("Cargo.toml");
        // Without dependencies cargo reads manifests only: no network, no lock.
        let metadata = MetadataCommand::new().manifest_path(manifest).no_deps().exec();
        let metadata = metadata.unwrap_or_else(|error| panic!("{error}"));
        Self { files, metadata }
    }

    /// All Rust files, parsed; a syntax error fails the test with its place.
    fn rust(&self) -> Vec<Rust<'_>> {
        let sources = self.files.iter().filter(|file| file.is_rust());
        sources.map(|file| Rust::parse(file).unwrap_or_else(|error| panic!("{error}"))).collect()
    }

    /// Members of the workspace: folder relative to the root, and package name.
    fn members(&self) -> Vec<(String, String)> {
        let packages = self.metadata.workspace_packages();
        let member = packages.iter().map(|package| {
            let manifest = package.manifest_path.strip_prefix(&self.metadata.workspace_root);
            let folder = manifest.ok().and_then(|manifest| manifest.parent());
            (folder.map(ToString::to_string).unwrap_or_default(), package.name.to_string())
        });
        member.collect()
    }

    /// A committed file by its path.
    fn file(&self, path: &str) -> &File {
        let found = self.files.iter().find(|file| file.path == path);
        found.unwrap_or_else(|| panic!("{path} is not in the repository"))
    }
}

/// Files of the package in `folder`, not those of packages in folders below it.
fn in_package(path: &str, folder: &str) -> bool {
    let rest = path.strip_prefix(folder).and_then(|rest| rest.strip_prefix('/'));
    rest.is_some_and(|rest| {
        ["src/", "tests/", "benches/", "examples/", "build.rs"].iter().any(|at| rest.starts_with(at))
    })
}

/// How many findings lie in which folder, two components deep.
fn counts_by_folder(findings: &[Finding]) -> String {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for finding in findings {
        let folder: Vec<&str> = finding.location.split('/').take(2).collect();
        *counts.entry(folder.join("/")).or_default() += 1;
    }
    counts.iter().map(|(folder, count)| format!("  {count:5} {folder}\n")).collect()
}

#[track_caller]
fn expect_none(what_to_do: &str, mut findings: Vec<Finding>) {
    findings.sort();
    let list: String = findings.iter().map(|finding| format!("\n  {finding}")).collect();
    let counts = counts_by_folder(&findings);
    assert!(findings.is_empty(), "{} finding(s). {what_to_do}{list}\n{counts}", findings.len());
}

fn expect_none_in_rust(what_to_do: &str, rule: impl Fn(&Rust<'_>) -> Vec<Finding>) {
    let repository = Repository::read();
    expect_none(what_to_do, repository.rust().iter().flat_map(rule).collect());
}

#[test]
fn crates_import_only_downward() {
    let repository = Repository::read();
    let members: Vec<String> = repository.members().into_iter().map(|(_, name)| name).collect();
    let findings = edges::undrawn(&members, &edges::imports(&repository.metadata));
    expect_none(
        "Move the code to the side of the arrow where it belongs; if the drawing is wrong, change ARCHITECTURE.md \
         and e2e/tidy/src/edges.rs in the same commit.",
        findings,
    );
}

#[test]
fn the_architecture_page_draws_what_is_checked() {
    let repository = Repository::read();
    let members: Vec<String> = repository.members().into_iter().map(|(_, name)| name).collect();
    let document = repository.file("ARCHITECTURE.md");
    expect_none(
        "Draw in ARCHITECTURE.md what e2e/tidy/src/edges.rs checks, and the other way round.",
        edges::drawn_otherwise(document, &members),
    );
}

#[test]
fn crates_of_others_stay_where_they_belong() {
    let repository = Repository::read();
    expect_none(
        "Pass the value in instead; the table is in e2e/tidy/src/edges.rs.",
        edges::forbidden_imports(&edges::imports(&repository.metadata)),
    );
}

#[test]
fn packages_are_named_after_their_folders() {
    let repository = Repository::read();
    expect_none("Name a package trustformers-FOLDER.", edges::misnamed(&repository.members()));
}

#[test]
fn no_crate_is_empty() {
    let repository = Repository::read();
    let rust = repository.rust();
    let empty = |(folder, _): &(String, String)| {
        let sources: Vec<_> = rust.iter().filter(|rust| in_package(&rust.file.path, folder)).collect();
        shape::empty_package(folder, &sources)
    };
    let findings = repository.members().iter().filter_map(empty).collect();
    expect_none("Add a crate when it has something to do.", findings);
}

#[test]
fn manifests_inherit_from_the_workspace() {
    let repository = Repository::read();
    let members = repository.members();
    let manifests = members.iter().map(|(folder, _)| repository.file(&format!("{folder}/Cargo.toml")));
    expect_none(
        "Copy the head of another crate's Cargo.toml.",
        manifests.flat_map(manifests::not_inherited).collect(),
    );
}

#[test]
fn dependencies_come_from_the_workspace_table() {
    let repository = Repository::read();
    let members = repository.members();
    let manifests = members.iter().map(|(folder, _)| repository.file(&format!("{folder}/Cargo.toml")));
    expect_none(
        "Put version and features into [workspace.dependencies] of the root Cargo.toml.",
        manifests.flat_map(manifests::own_versions).collect(),
    );
}

#[test]
fn every_dependency_is_used() {
    let repository = Repository::read();
    let rust = repository.rust();
    let members = repository.members();
    let mut findings = Vec::new();
    for (folder, name) in &members {
        let sources: Vec<_> = rust.iter().filter(|rust| in_package(&rust.file.path, folder)).collect();
        findings.extend(manifests::unused(name, repository.file(&format!("{folder}/Cargo.toml")), &sources));
    }
    let manifests: Vec<_> =
        members.iter().map(|(folder, _)| repository.file(&format!("{folder}/Cargo.toml"))).collect();
    findings.extend(manifests::idle_in_table(repository.file("Cargo.toml"), &manifests));
    expect_none(
        "Remove the line. If only generated code uses it, name it with the reason in e2e/tidy/src/manifests.rs.",
        findings,
    );
}

#[test]
fn files_are_short() {
    expect_none_in_rust("Find the two subjects in the file and give each its own.", |rust| {
        shape::long_file(rust).into_iter().collect()
    });
}

#[test]
fn no_parameter_is_a_tuple() {
    expect_none_in_rust("Make it a struct with named fields.", shape::tuple_parameters);
}

#[test]
fn names_are_the_standard_ones() {
    let repository = Repository::read();
    let mut findings: Vec<Finding> = repository.rust().iter().flat_map(names::banned_identifiers).collect();
    findings.extend(repository.files.iter().flat_map(names::banned_file_names));
    expect_none(
        "Use the standard word. Where the word is the standard one in that folder, say so in e2e/tidy/src/names.rs.",
        findings,
    );
}

#[test]
fn one_type_name_for_one_thing() {
    let repository = Repository::read();
    let rust = repository.rust();
    let findings = repository.members().into_iter().flat_map(|(folder, _)| {
        // Each example is a crate of its own that nothing imports.
        let examples = format!("{folder}/examples/");
        let sources = rust
            .iter()
            .filter(|rust| in_package(&rust.file.path, &folder) && !rust.file.path.starts_with(&examples));
        names::shared_type_names(&sources.flat_map(names::types_of).collect::<Vec<_>>())
    });
    expect_none("Rename one of them after what it is.", findings.collect());
}

#[test]
fn every_source_file_is_compiled() {
    let repository = Repository::read();
    let rust = repository.rust();
    let members = repository.members();
    let folders: Vec<&str> = members.iter().map(|(folder, _)| folder.as_str()).collect();
    expect_none(
        "Delete the file, or name it with `mod` in its parent.",
        reach::unreached_sources(&folders, &rust.iter().collect::<Vec<_>>()),
    );
}

#[test]
fn every_script_is_used() {
    expect_none(
        "Delete the script, or name it where it is started.",
        reach::unnamed_scripts(&Repository::read().files),
    );
}

#[test]
fn comments_fit_their_columns() {
    let findings = Repository::read().files.iter().flat_map(comments::wide_comments).collect();
    expect_none("Break the line.", findings);
}

#[test]
fn backticked_paths_exist() {
    let repository = Repository::read();
    let paths = comments::Paths::new(&repository.files);
    let findings = repository.files.iter().flat_map(|file| comments::stale_paths(file, &paths));
    expect_none("Name the file where it is now.", findings.collect());
}

#[test]
fn names_say_something() {
    let findings = Repository::read().files.iter().flat_map(shape::empty_names).collect();
    expect_none("Name it after what it does, or move each part to the module that needs it.", findings);
}

#[test]
fn files_say_what_they_are_for() {
    let findings = Repository::read().files.iter().filter_map(shape::undescribed).collect();
    expect_none("Start with what the file is for and why it is as it is.", findings);
}

#[test]
fn bounds_of_queues_say_where_they_come_from() {
    let repository = Repository::read();
    let rust = repository.rust();
    let explained = rust.iter().flat_map(hygiene::explained_constants).collect();
    expect_none(
        "Write the arithmetic above the call, or above the constant that is the bound.",
        rust.iter().flat_map(|rust| hygiene::unexplained_bounds(rust, &explained)).collect(),
    );
}

#[test]
fn tests_do_not_sleep() {
    expect_none_in_rust(
        "Wait for a condition, or use #[tokio::test(start_paused = true)].",
        hygiene::sleeping_tests,
    );
}

#[test]
fn libraries_have_typed_errors() {
    expect_none_in_rust(
        "Use an enum that derives thiserror::Error; anyhow is for main.rs and e2e.",
        boundaries::anyhow_in_libraries,
    );
}

#[test]
fn control_does_no_io_and_reads_no_clock() {
    expect_none_in_rust("Take the value as an argument; the operator reads it.", boundaries::impure_control);
}

#[test]
fn no_binaries_and_no_large_files() {
    let findings = Repository::read().files.iter().filter_map(text::not_source).collect();
    expect_none("Commit the recipe instead, and make the file when it is needed.", findings);
}

#[test]
fn no_paths_of_one_machine() {
    let findings = Repository::read().files.iter().flat_map(text::machine_paths).collect();
    expect_none("Use a path relative to the repository, $HOME or a temporary folder.", findings);
}

#[test]
fn no_addresses_of_package_registries() {
    let findings = Repository::read().files.iter().flat_map(text::registry_hosts).collect();
    expect_none("Use the package manager's client with its own settings.", findings);
}

#[test]
fn shell_scripts_stop_at_the_first_error() {
    let findings = Repository::read().files.iter().flat_map(text::careless_script).collect();
    expect_none(
        "Start as every script here: bash, a comment with the purpose, `set -euo pipefail`; or, if other scripts source \
         it: `# PURPOSE. Sourced.`",
        findings,
    );
}
