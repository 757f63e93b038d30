//! Dead files: Rust that no crate compiles, and scripts that nothing starts.

use crate::Finding;
use crate::rust::Rust;
use crate::tree::File;
use std::collections::{BTreeMap, BTreeSet};
use syn::visit::{self, Visit};

/// Folders of a package in which cargo finds crates by itself.
const CRATE_FOLDERS: &[&str] = &["src/bin", "tests", "examples", "benches"];

/// Rust files of the packages in `folders` that no `mod` reaches from the root of a crate.
pub fn unreached_sources(folders: &[&str], sources: &[&Rust<'_>]) -> Vec<Finding> {
    let by_path: BTreeMap<&str, &Rust<'_>> =
        sources.iter().map(|rust| (rust.file.path.as_str(), *rust)).collect();
    let mut reached = BTreeSet::new();
    let roots = by_path.keys().filter(|path| folders.iter().any(|folder| is_crate_root(path, folder)));
    let mut open: Vec<String> = roots.map(|path| (*path).to_owned()).collect();
    while let Some(path) = open.pop() {
        let Some(rust) = by_path.get(path.as_str()) else { continue };
        if reached.insert(path.clone()) {
            let is_root = folders.iter().any(|folder| is_crate_root(&path, folder));
            open.extend(named_files(&path, is_root, rust));
        }
    }
    let dead = by_path.keys().filter(|path| !reached.contains(**path));
    dead.map(|path| Finding::whole(*path, "no `mod` reaches this file: it is not compiled")).collect()
}

/// True for a file that cargo compiles as the root of a crate.
fn is_crate_root(path: &str, folder: &str) -> bool {
    let Some(rest) = path.strip_prefix(folder).and_then(|rest| rest.strip_prefix('/')) else { return false };
    let in_crate_folder = |at: &str| {
        let name = rest.strip_prefix(at).and_then(|name| name.strip_prefix('/'));
        name.is_some_and(|name| {
            !name.contains('/') || (name.matches('/').count() == 1 && name.ends_with("/main.rs"))
        })
    };
    matches!(rest, "src/lib.rs" | "src/main.rs" | "build.rs")
        || CRATE_FOLDERS.iter().any(|at| in_crate_folder(at))
}

/// The files that the `mod` and `include!` lines of a file may mean.
fn named_files(path: &str, is_root: bool, rust: &Rust<'_>) -> Vec<String> {
    let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
    let own_folder = is_root || name == "mod.rs";
    let below =
        if own_folder { folder.to_owned() } else { format!("{folder}/{}", name.trim_end_matches(".rs")) };
    let mut finder = ModFinder { beside: folder.to_owned(), below, inline: Vec::new(), files: Vec::new() };
    finder.visit_file(&rust.tree);
    finder.files
}

struct ModFinder {
    /// Folder of the file: `#[path]` and `include!` start here.
    beside: String,
    /// Folder of the file's modules.
    below: String,
    /// Names of the inline modules around the place at hand.
    inline: Vec<String>,
    files: Vec<String>,
}

impl<'ast> Visit<'ast> for ModFinder {
    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        let name = item.ident.to_string();
        if item.content.is_some() {
            self.inline.push(name);
            visit::visit_item_mod(self, item);
            self.inline.pop();
            return;
        }
        if let Some(given) = item.attrs.iter().find_map(path_attribute) {
            self.files.push(joined(&self.beside, &given));
            return;
        }
        let folder: String = std::iter::once(self.below.as_str())
            .chain(self.inline.iter().map(String::as_str))
            .collect::<Vec<_>>()
            .join("/");
        self.files.push(format!("{folder}/{name}.rs"));
        self.files.push(format!("{folder}/{name}/mod.rs"));
    }

    fn visit_macro(&mut self, item: &'ast syn::Macro) {
        let text = item.path.is_ident("include").then(|| syn::parse2::<syn::LitStr>(item.tokens.clone()));
        if let Some(Ok(text)) = text {
            self.files.push(joined(&self.beside, &text.value()));
        }
        visit::visit_macro(self, item);
    }
}

fn path_attribute(attribute: &syn::Attribute) -> Option<String> {
    let syn::Meta::NameValue(pair) = &attribute.meta else { return None };
    let syn::Expr::Lit(syn::ExprLit { lit: syn::Lit::Str(text), .. }) = &pair.value else { return None };
    pair.path.is_ident("path").then(|| text.value())
}

/// `folder/relative` with its `..` resolved.
fn joined(folder: &str, relative: &str) -> String {
    let mut components: Vec<&str> = folder.split('/').collect();
    for component in relative.split('/') {
        match component {
            ".." => {
                components.pop();
            }
            "." => {}
            _ => components.push(component),
        }
    }
    components.join("/")
}

/// Shell and Python scripts that no other file names: neither its file name anywhere, nor, for what is
/// sourced or imported, the bare name in a script of the same folder.
pub fn unnamed_scripts(files: &[File]) -> Vec<Finding> {
    let scripts = files.iter().filter(|file| file.path.ends_with(".sh") || file.path.ends_with(".py"));
    let dead =
        scripts.filter(|script| !files.iter().any(|other| other.path != script.path && names(other, script)));
    dead.map(|script| Finding::whole(&script.path, "nothing names this script")).collect()
}

fn names(other: &File, script: &File) -> bool {
    let text = other.text.as_deref().unwrap_or_default();
    if text.contains(script.name()) {
        return true;
    }
    let folder = |file: &File| file.path.rsplit_once('/').map(|(folder, _)| folder.to_owned());
    let is_script = other.path.ends_with(".sh") || other.path.ends_with(".py");
    let stem = script.name().rsplit_once('.').map_or(script.name(), |(stem, _)| stem);
    is_script && folder(other) == folder(script) && other.lines().any(|(_, line)| names_in_code(line, stem))
}

fn names_in_code(line: &str, stem: &str) -> bool {
    let loads =
        ["source ", "import ", "from ", "for "].iter().any(|word| line.trim_start().starts_with(word));
    loads && line.split(|c: char| !c.is_alphanumeric() && c != '_' && c != '-').any(|word| word == stem)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_no_mod_reaches_are_found() {
        let files = [
            File::from_text(
                "a/src/lib.rs",
                "mod one;\nmod inline { mod two; }\n#[path = \"odd/name.rs\"]\nmod three;\n",
            ),
            File::from_text("a/src/one.rs", "mod below;\n"),
            File::from_text("a/src/one/below.rs", ""),
            File::from_text("a/src/inline/two.rs", ""),
            File::from_text("a/src/odd/name.rs", "include!(\"../included.rs\");\n"),
            File::from_text("a/src/included.rs", ""),
            File::from_text("a/src/dead.rs", ""),
            File::from_text("a/tests/alone.rs", "mod support;\n"),
            File::from_text("a/tests/support/mod.rs", "mod more;\n"),
            File::from_text("a/tests/support/more.rs", ""),
            File::from_text("a/tests/support/dead.rs", ""),
            File::from_text("a/src/bin/tool/main.rs", ""),
        ];
        let sources: Vec<Rust<'_>> = files.iter().map(|file| Rust::parse(file).unwrap()).collect();
        let found = unreached_sources(&["a"], &sources.iter().collect::<Vec<_>>());
        let locations: Vec<&str> = found.iter().map(|finding| finding.location.as_str()).collect();
        assert_eq!(locations, ["a/src/dead.rs", "a/tests/support/dead.rs"]);
    }

    #[test]
    fn scripts_that_nothing_names_are_found() {
        let files = [
            File::from_text("Makefile", "test:\n\t@e2e/test.sh\n"),
            File::from_text("e2e/test.sh", "for name in sourced; do source \"$name.sh\"; done\n# dead\n"),
            File::from_text("e2e/sourced.sh", ""),
            File::from_text("e2e/tool.py", "import library\n"),
            File::from_text("e2e/library.py", "\"\"\"Used by tool.py.\"\"\"\n"),
            File::from_text("e2e/dead.sh", "dead.sh\n"),
        ];
        assert_eq!(unnamed_scripts(&files), [Finding::whole("e2e/dead.sh", "nothing names this script")]);
    }
}
