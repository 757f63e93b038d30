//! The shape of source files: their length, empty names, tuple parameters, and a first line that says what a
//! file is for. The length of functions and the number of parameters are limits of clippy.
//!
//! A line of code is one that holds something besides white space and comments, so that comments are free.

use crate::Finding;
use crate::rust::Rust;
use crate::tree::File;
use syn::spanned::Spanned;
use syn::visit::{self, Visit};

/// Lines of code in a file, its `#[cfg(test)]` items not counted.
pub const FILE_LINES: usize = 500;
/// Shortest description of a module, in characters: a word or two says nothing.
pub const DESCRIPTION_CHARS: usize = 20;
/// Names that say nothing about what is inside. As file, folder or inline module.
const EMPTY_NAMES: &[&str] = &["utils", "util", "helpers", "helper", "common", "misc"];

/// A file that is too long. Files that hold only tests of the module beside them (`tests.rs`) may be as long
/// as they need; an integration test is a program of its own and may not.
pub fn long_file(rust: &Rust<'_>) -> Option<Finding> {
    if rust.file.path.contains("/src/") && rust.is_test(1) {
        return None;
    }
    let lines =
        rust.numbered().filter(|(number, line)| line.has_code() && !rust.in_test_item(*number)).count();
    let what = format!("{lines} lines of code before tests, {FILE_LINES} allowed");
    (lines > FILE_LINES).then(|| Finding::whole(&rust.file.path, what))
}

/// Parameters of functions whose type is a tuple of two or more: a struct names its fields, and the limit on
/// the number of parameters is not evaded. Methods of `impl Trait for Type` follow the trait and are not
/// looked at.
pub fn tuple_parameters(rust: &Rust<'_>) -> Vec<Finding> {
    let mut finder = TupleFinder { path: &rust.file.path, found: Vec::new() };
    finder.visit_file(&rust.tree);
    finder.found
}

struct TupleFinder<'a> {
    path: &'a str,
    found: Vec<Finding>,
}

impl TupleFinder<'_> {
    fn check(&mut self, signature: &syn::Signature) {
        for parameter in &signature.inputs {
            let syn::FnArg::Typed(parameter) = parameter else { continue };
            if is_tuple(&parameter.ty) {
                let what = format!("`{}` has a parameter that is a tuple", signature.ident);
                self.found.push(Finding::at(self.path, parameter.span().start().line, what));
            }
        }
    }
}

fn is_tuple(kind: &syn::Type) -> bool {
    match kind {
        syn::Type::Tuple(tuple) => tuple.elems.len() >= 2,
        syn::Type::Reference(to) => is_tuple(&to.elem),
        syn::Type::Paren(inner) => is_tuple(&inner.elem),
        syn::Type::Group(inner) => is_tuple(&inner.elem),
        _ => false,
    }
}

impl<'ast> Visit<'ast> for TupleFinder<'_> {
    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        self.check(&item.sig);
        visit::visit_item_fn(self, item);
    }

    fn visit_item_impl(&mut self, item: &'ast syn::ItemImpl) {
        if item.trait_.is_none() {
            for member in &item.items {
                if let syn::ImplItem::Fn(method) = member {
                    self.check(&method.sig);
                }
            }
        }
        visit::visit_item_impl(self, item);
    }

    fn visit_trait_item_fn(&mut self, item: &'ast syn::TraitItemFn) {
        self.check(&item.sig);
        visit::visit_trait_item_fn(self, item);
    }
}

/// Files, folders and inline modules with a name that says nothing.
pub fn empty_names(file: &File) -> Vec<Finding> {
    let stems = file.path.split('/').map(|name| name.split('.').next().unwrap_or(name));
    let mut findings: Vec<_> = stems
        .filter(|stem| EMPTY_NAMES.contains(stem))
        .map(|stem| Finding::whole(&file.path, format!("`{stem}` says nothing")))
        .collect();
    if file.is_rust() {
        for (number, line) in file.lines() {
            let name =
                line.split("mod ").nth(1).and_then(|rest| rest.split(|c: char| !c.is_alphanumeric()).next());
            if line.trim_end().ends_with('{') && name.is_some_and(|name| EMPTY_NAMES.contains(&name)) {
                findings.push(Finding::at(&file.path, number, "the module's name says nothing"));
            }
        }
    }
    findings
}

/// A Rust file that does not start with `//!`, or a Python file that does not start with a docstring.
pub fn undescribed(file: &File) -> Option<Finding> {
    let mark = if file.is_rust() {
        "//!"
    } else if file.path.ends_with(".py") {
        "\"\"\""
    } else {
        return None;
    };
    let first =
        file.lines().map(|(_, line)| line.trim()).find(|line| !line.is_empty() && !line.starts_with("#!/"));
    let description = first.and_then(|line| line.strip_prefix(mark)).unwrap_or_default();
    let what = format!("does not start with `{mark}` and a sentence");
    (description.trim().chars().count() < DESCRIPTION_CHARS).then(|| Finding::whole(&file.path, what))
}

/// A package, given with its sources, that holds no code: only documentation, or module declarations of
/// nothing.
pub fn empty_package(folder: &str, sources: &[&Rust<'_>]) -> Option<Finding> {
    let program = sources.iter().filter(|rust| rust.file.path.contains("/src/"));
    let functions: usize = program.clone().map(|rust| rust.functions.len()).sum();
    let items: usize = program.map(|rust| rust.items()).sum();
    (functions == 0 && items < 4).then(|| Finding::whole(folder, "is an empty crate"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_lines(count: usize, path: &str) -> File {
        File::from_text(
            path,
            &format!("//! A file that is long.\n\n{}", "// why\nconst A: u8 = 1;\n".repeat(count)),
        )
    }

    #[test]
    fn long_files_are_found() {
        let fits = with_lines(FILE_LINES, "a/src/lib.rs");
        assert_eq!(long_file(&Rust::parse(&fits).unwrap()), None);
        for path in ["a/src/lib.rs", "a/tests/long.rs"] {
            let long = with_lines(FILE_LINES + 1, path);
            assert!(long_file(&Rust::parse(&long).unwrap()).unwrap().what.starts_with("501 lines"), "{path}");
        }
    }

    #[test]
    fn tests_do_not_count() {
        let text = format!("//! Doc.\n#[cfg(test)]\nmod tests {{\n{}}}\n", "const A: u8 = 1;\n".repeat(600));
        let file = File::from_text("a/src/lib.rs", &text);
        assert_eq!(long_file(&Rust::parse(&file).unwrap()), None);
        let beside = with_lines(600, "a/src/split/tests.rs");
        assert_eq!(long_file(&Rust::parse(&beside).unwrap()), None);
    }

    #[test]
    fn tuple_parameters_are_found() {
        for (text, expected) in [
            ("fn a(b: (u8, u8)) {}\n", 1),
            ("fn a(b: &mut (u8, u8), (c, d): (u8, u8)) {}\n", 2),
            ("trait A { fn b(&self, c: (u8, u8)); }\n", 1),
            ("impl A { fn b(&self, c: (u8, u8)) { fn d(e: (u8, u8)) {} } }\n", 2),
            ("impl B for A { fn b(&self, c: (u8, u8)) {} }\n", 0),
            ("fn a(b: (), c: (u8,), d: &[(u8, u8)], e: fn((u8, u8))) -> (u8, u8) { f(|(g, h)| g) }\n", 0),
        ] {
            let file = File::from_text("a/src/lib.rs", text);
            assert_eq!(tuple_parameters(&Rust::parse(&file).unwrap()).len(), expected, "{text}");
        }
    }

    #[test]
    fn names_that_say_nothing_are_found() {
        for path in ["a/src/utils.rs", "a/src/common/mod.rs", "e2e/helpers.sh"] {
            assert_eq!(empty_names(&File::from_text(path, "")).len(), 1, "{path}");
        }
        let inline = File::from_text("a/src/lib.rs", "pub(crate) mod helpers {\n}\nmod commonplace {\n}\n");
        assert_eq!(empty_names(&inline), [Finding::at("a/src/lib.rs", 1, "the module's name says nothing")]);
    }

    #[test]
    fn files_without_a_description_are_found() {
        for (path, text, fine) in [
            ("a.rs", "//! What this file is for, at length.\n", true),
            ("a.rs", "// A comment that is no documentation.\n", false),
            ("a.rs", "//! Short.\n", false),
            ("a.rs", "", false),
            ("a.py", "#!/usr/bin/env python3\n\"\"\"Makes the reference outputs.\n\"\"\"\n", true),
            ("a.py", "import sys\n", false),
            ("a.md", "text", true),
        ] {
            assert_eq!(undescribed(&File::from_text(path, text)).is_none(), fine, "{path}: {text:?}");
        }
    }

    #[test]
    fn empty_crates_are_found() {
        let empty = File::from_text("a/src/lib.rs", "//! To come.\n");
        assert!(empty_package("a", &[&Rust::parse(&empty).unwrap()]).is_some());
        let real = File::from_text("a/src/main.rs", "//! Real.\nfn main() {}\n");
        assert!(empty_package("a", &[&Rust::parse(&real).unwrap()]).is_none());
    }
}
