//! Which crate of this workspace may import which, as ARCHITECTURE.md draws it.
//!
//! Edges point strictly downward and an arrow also allows what its target may import. A new
//! crate is added here and in the drawing.

use crate::Finding;
use crate::tree::File;
use cargo_metadata::{DependencyKind, Metadata, Package};
use std::collections::{BTreeMap, BTreeSet};

/// A crate and the crates that it may import directly.
type Arrow = (&'static str, &'static [&'static str]);

/// The drawing of ARCHITECTURE.md, "Crates and imports". Change both together.
pub const ARROWS: &[Arrow] = &[
    ("trustformers-crds", &["trustformers-proto"]),
    ("trustformers-proto", &[]),
    ("trustformers-plan", &[]),
    ("trustformers-telemetry", &[]),
    ("trustformers-store", &[]),
    ("trustformers-stats", &[]),
    ("trustformers-control", &["trustformers-crds", "trustformers-proto", "trustformers-stats"]),
    ("trustformers-operator", &["trustformers-control", "trustformers-telemetry"]),
    ("trustformers-kubectl", &["trustformers-crds"]),
    ("trustformers-cpu", &["trustformers-plan"]),
    ("trustformers-conformance", &["trustformers-plan"]),
    ("trustformers-model", &["trustformers-plan", "trustformers-proto"]),
    ("trustformers-engine", &["trustformers-model", "trustformers-plan", "trustformers-telemetry"]),
    ("trustformers-api", &["trustformers-proto"]),
    (
        "trustformers-runtime",
        &[
            "trustformers-engine",
            "trustformers-cpu",
            "trustformers-store",
            "trustformers-api",
            "trustformers-telemetry",
        ],
    ),
    ("trustformers-gateway", &["trustformers-api", "trustformers-telemetry"]),
    (
        "trustformers-serve",
        &["trustformers-gateway", "trustformers-runtime", "trustformers-crds", "trustformers-stats"],
    ),
    ("trustformers-e2e", &["trustformers-crds", "trustformers-proto", "trustformers-api"]),
    ("trustformers-fuzz", &["trustformers-engine", "trustformers-api"]),
    ("trustformers-tidy", &[]),
];

/// Edges that only tests may have: from, to, reason.
pub const TEST_ARROWS: &[(&str, &str, &str)] = &[
    ("trustformers-cpu", "trustformers-conformance", "every backend runs the one suite"),
    ("trustformers-engine", "trustformers-conformance", "its device with late answers tests steps ahead"),
    (
        "trustformers-engine",
        "trustformers-cpu",
        "parity with the reference outputs needs a backend that is fast enough",
    ),
];

/// Packages whose name does not follow from their folder, each with the name it has.
pub const NAMED: &[(&str, &str)] = &[("runtime/pod", "trustformers-runtime")];

/// External crates that a crate of this workspace must not use, with the reason.
pub const FORBIDDEN: &[(&str, &[&str], &str)] = &[
    (
        "trustformers-gateway",
        &["kube", "k8s-openapi"],
        "the gateway knows no cluster and holds no credentials for one",
    ),
    ("trustformers-api", &["kube", "k8s-openapi"], "codecs must work with no cluster"),
    (
        "trustformers-control",
        &["tokio", "hyper", "tonic", "axum", "tracing", "rand"],
        "control is pure: no I/O, no clock",
    ),
    (
        "trustformers-plan",
        &["tokio", "tonic", "axum", "serde"],
        "the plan is arithmetic and knows no runtime",
    ),
    ("trustformers-cpu", &["tokio", "tonic", "axum"], "a backend is driven by the engine's device thread"),
    ("trustformers-model", &["tokio", "tonic", "axum"], "lowering a model is a function of its files"),
];

/// One import of a workspace member by another, or of an outside crate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Import {
    /// The importing package.
    pub from: String,
    /// The imported package.
    pub to: String,
    /// True when only tests, benches and examples have it.
    pub tests_only: bool,
}

/// All direct imports of the workspace's members, outside crates included.
pub fn imports(metadata: &Metadata) -> Vec<Import> {
    let of = |package: &Package| {
        let from = package.name.to_string();
        let found = package.dependencies.iter().map(move |dependency| Import {
            from: from.clone(),
            to: dependency.name.clone(),
            tests_only: dependency.kind == DependencyKind::Development,
        });
        found.collect::<Vec<_>>()
    };
    metadata.workspace_packages().into_iter().flat_map(of).collect()
}

/// Everything that a crate may import: along the arrows, any number of steps. None for a crate that is not
/// drawn.
fn allowed(name: &str) -> Option<BTreeSet<&'static str>> {
    let arrows = |name: &str| ARROWS.iter().find(|(from, _)| *from == name).map(|(_, to)| *to);
    let mut open = arrows(name)?.to_vec();
    let mut reached = BTreeSet::new();
    while let Some(next) = open.pop() {
        if reached.insert(next) {
            open.extend(arrows(next).unwrap_or_default());
        }
    }
    Some(reached)
}

/// Imports between members that are not drawn.
pub fn undrawn(members: &[String], imports: &[Import]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for member in members {
        let Some(allowed) = allowed(member) else {
            findings.push(Finding::whole(member, "is not drawn"));
            continue;
        };
        let to_members =
            imports.iter().filter(|import| import.from == *member && members.contains(&import.to));
        for Import { to, tests_only, .. } in to_members {
            let for_tests = TEST_ARROWS.iter().any(|(from, into, _)| from == member && into == to);
            if !(allowed.contains(to.as_str()) || (*tests_only && for_tests)) {
                let kind = if *tests_only { "imports (in tests)" } else { "imports" };
                findings.push(Finding::whole(member, format!("{kind} {to}")));
            }
        }
    }
    findings
}

/// Differences between the drawing on the architecture page and the table here, for the crates that exist.
///
/// The drawing names crates by their folders: `engine → model, plan   api → proto`, and leaves after
/// `leaves`.
pub fn drawn_otherwise(document: &File, members: &[String]) -> Vec<Finding> {
    let mut drawn: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (_, line) in document.lines() {
        if let Some(leaves) = line.strip_prefix("leaves ") {
            drawn.extend(leaves.split_whitespace().map(|leaf| (package(leaf), BTreeSet::new())));
        } else if line.contains('→') && !line.starts_with([' ', '-', '|', '`']) {
            drawn.extend(arrows(line));
        }
    }
    // The rules of this repository are no part of the program.
    let exists = |name: &str| members.iter().any(|member| member == name) && name != "trustformers-tidy";
    let mut findings = Vec::new();
    for (name, targets) in ARROWS.iter().filter(|(name, _)| exists(name)) {
        let wanted: BTreeSet<_> = targets.iter().filter(|to| exists(to)).map(|to| (*to).to_owned()).collect();
        if drawn.get(*name) != Some(&wanted) {
            let what = format!("{name} is drawn with {:?}, checked with {wanted:?}", drawn.get(*name));
            findings.push(Finding::whole(&document.path, what));
        }
    }
    findings
}

/// The arrows of one line of the drawing; columns are only there for the eye.
fn arrows(line: &str) -> impl Iterator<Item = (String, BTreeSet<String>)> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let heads: Vec<usize> = (1..words.len()).filter(|&at| words[at] == "→").collect();
    heads.into_iter().map(move |head| {
        // After a comma one more target follows.
        let more = words[head + 1..].iter().take_while(|word| word.ends_with(',')).count();
        let targets = words[head + 1..].iter().take(more + 1);
        (package(words[head - 1]), targets.map(|word| package(word.trim_end_matches(','))).collect())
    })
}

/// The package that the drawing means by a folder's name.
fn package(folder: &str) -> String {
    let named = NAMED.iter().find(|(path, _)| path.rsplit('/').next() == Some(folder));
    named.map_or_else(|| format!("trustformers-{folder}"), |(_, name)| (*name).to_owned())
}

/// Outside crates where they are kept out on purpose; tests may use them.
pub fn forbidden_imports(imports: &[Import]) -> Vec<Finding> {
    let banned = |import: &Import| {
        let rule =
            FORBIDDEN.iter().find(|(from, to, _)| *from == import.from && to.contains(&import.to.as_str()));
        let (_, _, reason) = rule.filter(|_| !import.tests_only)?;
        Some(Finding::whole(&import.from, format!("imports {}: {reason}", import.to)))
    };
    imports.iter().filter_map(banned).collect()
}

/// Packages, given as folder relative to the root and name, whose name breaks the rule.
pub fn misnamed(packages: &[(String, String)]) -> Vec<Finding> {
    let wrong = |(folder, name): &(String, String)| {
        let exception = NAMED.iter().find(|(at, _)| at == folder).map(|(_, name)| (*name).to_owned());
        let last = folder.rsplit('/').next().unwrap_or(folder);
        let expected = exception.unwrap_or_else(|| format!("trustformers-{last}"));
        (*name != expected).then(|| Finding::whole(folder, format!("is named {name}, not {expected}")))
    };
    packages.iter().filter_map(wrong).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn import(from: &str, to: &str, tests_only: bool) -> Import {
        Import { from: from.to_owned(), to: to.to_owned(), tests_only }
    }

    fn members() -> Vec<String> {
        ARROWS.iter().map(|(name, _)| (*name).to_owned()).collect()
    }

    #[test]
    fn an_arrow_reaches_what_its_target_may_import() {
        let fine = [
            import("trustformers-operator", "trustformers-crds", false),
            import("trustformers-serve", "trustformers-plan", false),
            import("trustformers-engine", "trustformers-cpu", true),
            import("trustformers-plan", "half", false),
        ];
        assert_eq!(undrawn(&members(), &fine), []);
    }

    #[test]
    fn edges_upward_and_sideways_are_found() {
        let bad = [
            import("trustformers-plan", "trustformers-cpu", false),
            import("trustformers-operator", "trustformers-api", false),
            import("trustformers-gateway", "trustformers-crds", false),
            import("trustformers-engine", "trustformers-cpu", false),
            import("trustformers-store", "trustformers-telemetry", true),
        ];
        assert_eq!(undrawn(&members(), &bad).len(), bad.len());
    }

    #[test]
    fn a_member_that_is_not_drawn_is_found() {
        let found = undrawn(&["trustformers-new".to_owned()], &[]);
        assert_eq!(found, [Finding::whole("trustformers-new", "is not drawn")]);
    }

    #[test]
    fn the_drawing_has_no_circle_and_no_unknown_target() {
        for (name, targets) in ARROWS {
            assert!(!allowed(name).unwrap().contains(name), "{name} reaches itself");
            for target in *targets {
                assert!(allowed(target).is_some(), "{name} points at {target}, which is not drawn");
            }
        }
        for (from, to, _) in TEST_ARROWS {
            assert!(allowed(from).is_some() && allowed(to).is_some(), "{from} and {to} are drawn");
        }
    }

    #[test]
    fn a_drawing_that_differs_is_found() {
        let some: Vec<String> = ["plan", "proto", "cpu", "model"].iter().map(|name| package(name)).collect();
        let document = |text: &str| File::from_text("ARCHITECTURE.md", text);
        let good = "leaves   plan   proto\ncpu    → plan      model → plan, proto\n";
        assert_eq!(drawn_otherwise(&document(good), &some), []);
        for bad in [
            good.replace("plan   proto", "plan"),
            good.replace("model →", "engine →"),
            good.replace("cpu    → plan", "cpu   → plan, proto"),
        ] {
            assert_eq!(drawn_otherwise(&document(&bad), &some).len(), 1, "{bad}");
        }
        assert_eq!(drawn_otherwise(&document(""), &some).len(), some.len());
    }

    #[test]
    fn forbidden_imports_are_found_except_in_tests() {
        let bad = import("trustformers-gateway", "kube", false);
        assert_eq!(forbidden_imports(std::slice::from_ref(&bad)).len(), 1);
        assert_eq!(
            forbidden_imports(&[
                Import { tests_only: true, ..bad },
                import("trustformers-operator", "kube", false)
            ]),
            []
        );
    }

    #[test]
    fn names_follow_folders() {
        let pair = |folder: &str, name: &str| (folder.to_owned(), name.to_owned());
        let fine = [pair("runtime/plan", "trustformers-plan"), pair("runtime/pod", "trustformers-runtime")];
        assert_eq!(misnamed(&fine), []);
        assert_eq!(
            misnamed(&[pair("runtime/plan", "plan"), pair("runtime/pod", "trustformers-pod")]).len(),
            2
        );
    }
}
