//! One Rust file as the rules see it: its lines taken apart, its functions, and which lines belong to tests.

use crate::lexer::{self, Line};
use crate::tree::File;
use proc_macro2::TokenTree;
use std::ops::RangeInclusive;
use syn::spanned::Spanned;
use syn::visit::{self, Visit};

/// A function or method with a body.
#[derive(Debug, Clone)]
pub struct Function {
    /// Its name.
    pub name: String,
    /// Lines from its signature to its closing brace, counted from 1.
    pub lines: RangeInclusive<usize>,
    /// True when an attribute gives it tokio's paused clock.
    pub paused_clock: bool,
}

/// A parsed Rust file.
pub struct Rust<'a> {
    /// The file.
    pub file: &'a File,
    /// Its syntax tree.
    pub tree: syn::File,
    /// Its lines, taken apart.
    pub lines: Vec<Line>,
    /// Its functions, in order of appearance; nested ones too.
    pub functions: Vec<Function>,
    /// Lines of items under `#[cfg(test)]`.
    tests: Vec<RangeInclusive<usize>>,
    /// True where the file as a whole is a test.
    whole_is_test: bool,
}

impl<'a> Rust<'a> {
    /// Parses one file.
    ///
    /// # Errors
    /// A message with the place of the first syntax error.
    pub fn parse(file: &'a File) -> Result<Self, String> {
        let text = file.text.as_deref().unwrap_or_default();
        let tree = syn::parse_file(text)
            .map_err(|error| format!("{}:{}: {error}", file.path, error.span().start().line))?;
        let lines = lexer::lines(text);
        let mut finder = Finder::default();
        finder.visit_file(&tree);
        let Finder { functions, tests } = finder;
        let whole_is_test = is_test_path(&file.path);
        Ok(Self { file, tree, functions, tests, whole_is_test, lines })
    }

    /// True when line `number`, counted from 1, belongs to tests.
    pub fn is_test(&self, number: usize) -> bool {
        self.whole_is_test || self.in_test_item(number)
    }

    /// True when line `number`, counted from 1, lies in an item under `#[cfg(test)]`.
    pub fn in_test_item(&self, number: usize) -> bool {
        self.tests.iter().any(|range| range.contains(&number))
    }

    /// Lines with their numbers from 1.
    pub fn numbered(&self) -> impl Iterator<Item = (usize, &Line)> {
        self.lines.iter().enumerate().map(|(index, line)| (index + 1, line))
    }

    /// Number of top-level items.
    pub fn items(&self) -> usize {
        self.tree.items.len()
    }

    /// The innermost function around a line.
    pub fn function_at(&self, number: usize) -> Option<&Function> {
        let around = self.functions.iter().filter(|function| function.lines.contains(&number));
        around.min_by_key(|function| function.lines.end() - function.lines.start())
    }

    /// The comments about line `number`: on the line itself, and directly above the statement that it
    /// is part of, attributes in between allowed.
    pub fn comment_on(&self, number: usize) -> String {
        let mut found = self.lines[number - 1].comment.clone();
        let mut above = number - 1;
        while above > 0 {
            let line = &self.lines[above - 1];
            let code = line.code.trim();
            let is_attribute = code.starts_with("#[") || code.starts_with("#![");
            let ends_statement = code.ends_with([';', '{', '}']) || (code.ends_with(',') && !is_attribute);
            if (line.has_code() && !is_attribute && ends_statement)
                || (code.is_empty() && line.comment.is_empty())
            {
                break;
            }
            found.push('\n');
            found.push_str(&line.comment);
            above -= 1;
        }
        found
    }
}

/// Integration tests, and module files that by their name hold nothing but tests.
fn is_test_path(path: &str) -> bool {
    path.split('/').rev().skip(1).any(|folder| folder == "tests") || path.ends_with("/tests.rs")
}

/// True when the word stands in `code` on its own, not as part of a longer name.
pub fn has_word(code: &str, word: &str) -> bool {
    word_ends(code, word).next().is_some()
}

/// Where in `code` each lone occurrence of the word ends.
pub fn word_ends<'a>(code: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    let in_name = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(word).filter_map(move |(start, _)| {
        let end = start + word.len();
        let alone = !code[..start].ends_with(in_name) && !code[end..].starts_with(in_name);
        alone.then_some(end)
    })
}

#[derive(Default)]
struct Finder {
    functions: Vec<Function>,
    tests: Vec<RangeInclusive<usize>>,
}

impl Finder {
    fn function(&mut self, attributes: &[syn::Attribute], signature: &syn::Signature, body: &syn::Block) {
        let first = signature.span().start().line;
        let close = body.span().end().line;
        let paused_clock = attributes.iter().any(|attribute| match &attribute.meta {
            syn::Meta::List(list) => list.tokens.to_string().replace(' ', "").contains("start_paused=true"),
            _ => false,
        });
        let name = signature.ident.to_string();
        self.functions.push(Function { name, lines: first..=close, paused_clock });
    }

    fn mark_tests(&mut self, attributes: &[syn::Attribute], span: proc_macro2::Span) {
        if attributes.iter().any(is_cfg_test) {
            self.tests.push(span.start().line..=span.end().line);
        }
    }
}

impl<'ast> Visit<'ast> for Finder {
    fn visit_item(&mut self, item: &'ast syn::Item) {
        self.mark_tests(attributes_of(item), item.span());
        visit::visit_item(self, item);
    }

    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        self.function(&item.attrs, &item.sig, &item.block);
        visit::visit_item_fn(self, item);
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        self.mark_tests(&item.attrs, item.span());
        self.function(&item.attrs, &item.sig, &item.block);
        visit::visit_impl_item_fn(self, item);
    }

    fn visit_trait_item_fn(&mut self, item: &'ast syn::TraitItemFn) {
        if let Some(body) = &item.default {
            self.function(&item.attrs, &item.sig, body);
        }
        visit::visit_trait_item_fn(self, item);
    }
}

fn attributes_of(item: &syn::Item) -> &[syn::Attribute] {
    match item {
        syn::Item::Const(item) => &item.attrs,
        syn::Item::Enum(item) => &item.attrs,
        syn::Item::Fn(item) => &item.attrs,
        syn::Item::Impl(item) => &item.attrs,
        syn::Item::Macro(item) => &item.attrs,
        syn::Item::Mod(item) => &item.attrs,
        syn::Item::Static(item) => &item.attrs,
        syn::Item::Struct(item) => &item.attrs,
        syn::Item::Trait(item) => &item.attrs,
        syn::Item::Type(item) => &item.attrs,
        syn::Item::Use(item) => &item.attrs,
        _ => &[],
    }
}

/// `#[cfg(test)]`, `#[cfg(all(test, ...))]`; a `test` inside `not(...)` does not count.
fn is_cfg_test(attribute: &syn::Attribute) -> bool {
    let syn::Meta::List(list) = &attribute.meta else { return false };
    list.path.is_ident("cfg") && names_test(list.tokens.clone())
}

fn names_test(tokens: proc_macro2::TokenStream) -> bool {
    let mut negated = false;
    for token in tokens {
        match token {
            TokenTree::Ident(word) if word == "test" => return true,
            TokenTree::Ident(word) => negated = word == "not",
            TokenTree::Group(group) if !negated && names_test(group.stream()) => return true,
            _ => {}
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: &str = "//! Doc.\n\nfn a(x: u8) -> u8 {\n    // why\n\n    let y = x;\n    y\n}\n\n#[cfg(test)]\nmod tests {\n    #[tokio::test(start_paused = true)]\n    async fn b() {\n        c();\n    }\n}\n";

    #[test]
    fn functions_and_test_lines_are_found() {
        let file = File::from_text("x/src/lib.rs", SAMPLE);
        let rust = Rust::parse(&file).unwrap();
        let found: Vec<_> = rust.functions.iter().map(|f| (f.name.as_str(), f.paused_clock)).collect();
        assert_eq!(found, [("a", false), ("b", true)]);
        assert!(!rust.is_test(9) && rust.is_test(10) && rust.is_test(16));
        assert_eq!(rust.function_at(14).unwrap().name, "b");
    }

    #[test]
    fn whole_files_of_tests_are_known_by_their_path() {
        for (path, expected) in
            [("x/tests/a.rs", true), ("x/src/y/tests.rs", true), ("x/src/contests.rs", false)]
        {
            let file = File::from_text(path, "//! Doc.\nfn a() {}\n");
            assert_eq!(Rust::parse(&file).unwrap().is_test(2), expected, "{path}");
        }
    }

    #[test]
    fn cfg_not_test_is_not_a_test() {
        let file = File::from_text(
            "x/src/lib.rs",
            "#[cfg(not(test))]\nfn a() {}\n#[cfg(all(unix, test))]\nfn b() {}\n",
        );
        let rust = Rust::parse(&file).unwrap();
        assert!(!rust.is_test(2) && rust.is_test(4));
    }

    #[test]
    fn comments_above_a_statement_are_found_across_its_lines() {
        let text =
            "fn a() {\n    b();\n    // why\n    let c =\n        unsafe { d() };\n    e(); // side\n}\n";
        let file = File::from_text("x/src/lib.rs", text);
        let rust = Rust::parse(&file).unwrap();
        assert!(rust.comment_on(5).contains("why"));
        assert_eq!(rust.comment_on(2), "");
        assert_eq!(rust.comment_on(6), "// side");
    }

    #[test]
    fn words_are_whole() {
        assert!(has_word("use anyhow::Result;", "anyhow"));
        assert!(!has_word("let anyhow_like = 1;", "anyhow"));
    }
}
