//! Test: no change of the `.proto` files breaks a client: what `proto/wire.txt` lists must stay.
//!
//! The file has one line for each message, field, enum, value, service and method. A line that is gone, or
//! that says something else, is a change that breaks who was built with it: a field that was removed,
//! renumbered or renamed, another type, a method that is gone. Additions are written with
//! `TRUSTFORMERS_WRITE_GENERATED=1`; it never takes a line out. Whoever means to remove something deletes
//! its line by hand, and reserves its number in the `.proto` file.

use std::collections::BTreeSet;
use std::path::PathBuf;

use prost::Message;
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet,
    ServiceDescriptorProto,
};

fn committed() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("wire.txt")
}

/// The lines of a set of files, sorted.
fn lines(files: &[FileDescriptorProto]) -> BTreeSet<String> {
    let mut lines = BTreeSet::new();
    for file in files {
        let package = file.package();
        for message in &file.message_type {
            add_message(&mut lines, package, message);
        }
        for one in &file.enum_type {
            add_enum(&mut lines, package, one);
        }
        for service in &file.service {
            add_service(&mut lines, package, service);
        }
    }
    lines
}

fn add_message(lines: &mut BTreeSet<String>, scope: &str, message: &DescriptorProto) {
    let name = format!("{scope}.{}", message.name());
    lines.insert(format!("message {name}"));
    for field in &message.field {
        lines.insert(field_line(&name, message, field));
    }
    for nested in &message.nested_type {
        add_message(lines, &name, nested);
    }
    for one in &message.enum_type {
        add_enum(lines, &name, one);
    }
}

/// `field PACKAGE.MESSAGE 4 tokens: repeated uint32`, where a oneof is a part of the type.
fn field_line(message_name: &str, message: &DescriptorProto, field: &FieldDescriptorProto) -> String {
    let scalar = || format!("{:?}", field.r#type()).to_lowercase();
    let mut kind = match field.r#type() {
        Type::Message | Type::Enum | Type::Group => field.type_name().trim_start_matches('.').to_owned(),
        _ => scalar(),
    };
    if field.label() == Label::Repeated {
        kind = format!("repeated {kind}");
    }
    if field.proto3_optional() {
        kind = format!("optional {kind}");
    } else if let Some(index) = field.oneof_index {
        let oneof = message.oneof_decl[usize::try_from(index).unwrap()].name();
        kind = format!("oneof {oneof} {kind}");
    }
    format!("field {message_name} {} {}: {kind}", field.number(), field.name())
}

fn add_enum(lines: &mut BTreeSet<String>, scope: &str, one: &EnumDescriptorProto) {
    let name = format!("{scope}.{}", one.name());
    lines.insert(format!("enum {name}"));
    for value in &one.value {
        lines.insert(format!("value {name} {} {}", value.number(), value.name()));
    }
}

fn add_service(lines: &mut BTreeSet<String>, scope: &str, service: &ServiceDescriptorProto) {
    let name = format!("{scope}.{}", service.name());
    lines.insert(format!("service {name}"));
    for method in &service.method {
        let side = |streams: bool, message: &str| {
            let message = message.trim_start_matches('.');
            if streams { format!("stream {message}") } else { message.to_owned() }
        };
        let input = side(method.client_streaming(), method.input_type());
        let output = side(method.server_streaming(), method.output_type());
        lines.insert(format!("method {name} {}({input}): {output}", method.name()));
    }
}

/// What was there before and is not there now.
fn missing(before: &str, now: &BTreeSet<String>) -> Vec<String> {
    before.lines().filter(|line| !line.is_empty() && !now.contains(*line)).map(str::to_owned).collect()
}

#[test]
fn no_change_breaks_the_wire() {
    let set = FileDescriptorSet::decode(crate::DESCRIPTORS).unwrap();
    let now = lines(&set.file);
    let before = std::fs::read_to_string(committed()).unwrap_or_default();
    let missing = missing(&before, &now);
    assert!(
        missing.is_empty(),
        "these changes of the .proto files break clients (see proto/src/wire.rs):\n{}",
        missing.join("\n")
    );
    let text: String = now.iter().flat_map(|line| [line.as_str(), "\n"]).collect();
    if std::env::var_os("TRUSTFORMERS_WRITE_GENERATED").is_some() {
        std::fs::write(committed(), &text).unwrap();
        return;
    }
    assert!(
        before == text,
        "proto/wire.txt is not up to date: run TRUSTFORMERS_WRITE_GENERATED=1 cargo test --profile ci -p trustformers-proto --lib wire"
    );
}

#[test]
fn each_kind_of_breaking_change_is_found() {
    let compiled = |source: &str| {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("a.proto"), source).unwrap();
        let set = protox::compile(["a.proto"], [folder.path()]).unwrap();
        lines(&set.file)
    };
    let source = "syntax = \"proto3\"; package p;
        service S { rpc A(M) returns (stream M); }
        enum E { ZERO = 0; ONE = 1; }
        message M { string a = 1; optional uint32 b = 2; repeated E c = 3; oneof o { bool d = 4; } }";
    let before: String = compiled(source).iter().flat_map(|line| [line.as_str(), "\n"]).collect();
    for (from, to, lost) in [
        ("string a = 1;", "", "field p.M 1 a: string"),
        ("string a = 1;", "string a = 5;", "field p.M 1 a: string"),
        ("string a = 1;", "bytes a = 1;", "field p.M 1 a: string"),
        ("string a = 1;", "string other = 1;", "field p.M 1 a: string"),
        ("optional uint32 b", "uint32 b", "field p.M 2 b: optional uint32"),
        ("repeated E c", "E c", "field p.M 3 c: repeated p.E"),
        ("oneof o { bool d = 4; }", "bool d = 4;", "field p.M 4 d: oneof o bool"),
        ("ONE = 1;", "ONE = 2;", "value p.E 1 ONE"),
        ("rpc A(M) returns (stream M);", "", "method p.S A(p.M): stream p.M"),
        ("returns (stream M)", "returns (M)", "method p.S A(p.M): stream p.M"),
    ] {
        let changed = source.replace(from, to);
        assert_ne!(changed, source, "{from}");
        assert_eq!(missing(&before, &compiled(&changed)), [lost], "{from} -> {to}");
    }
    let added = source.replace("message M {", "message N {} message M { string e = 9;");
    assert!(missing(&before, &compiled(&added)).is_empty(), "an addition breaks nothing");
}
