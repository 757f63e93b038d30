//! What the references of a schema lead to: pointers, anchors and identifiers inside of one document. Nothing
//! is fetched.

use crate::grammar::json::Json;
use percent_encoding::percent_decode_str;
use std::collections::HashMap;

/// Members that hold values, not schemas.
const VALUES: &[&str] = &["const", "default", "enum", "example", "examples"];

/// Schemas of a document that have a name.
pub(super) struct References<'a> {
    root: &'a Json,
    root_base: String,
    by_identifier: HashMap<String, &'a Json>,
    by_anchor: HashMap<(String, String), (&'a Json, String)>,
}

/// A schema and the address that its own relative references start from.
#[derive(Clone)]
pub(super) struct Target<'a> {
    pub(super) schema: &'a Json,
    pub(super) base: String,
}

impl<'a> References<'a> {
    pub(super) fn new(root: &'a Json) -> Self {
        let mut references = Self {
            root,
            root_base: base_of(root, ""),
            by_identifier: HashMap::new(),
            by_anchor: HashMap::new(),
        };
        references.collect(root, "");
        references
    }

    pub(super) fn root(&self) -> Target<'a> {
        Target { schema: self.root, base: self.root_base.clone() }
    }

    fn collect(&mut self, json: &'a Json, base: &str) {
        match json {
            Json::Array(list) => list.iter().for_each(|json| self.collect(json, base)),
            Json::Object(members) => {
                let own = base_of(json, base);
                if own != base {
                    self.by_identifier.entry(own.clone()).or_insert(json);
                }
                for name in ["$anchor", "$dynamicAnchor"] {
                    if let Some(anchor) = members.get(name).and_then(Json::as_str) {
                        self.by_anchor.entry((own.clone(), anchor.to_owned())).or_insert((json, own.clone()));
                    }
                }
                // Drafts 6 and 7 write an anchor as `"$id": "#name"`.
                if let Some(anchor) = identifier(json).and_then(|id| id.strip_prefix('#')) {
                    self.by_anchor.entry((own.clone(), anchor.to_owned())).or_insert((json, own.clone()));
                }
                for (_, value) in members.iter().filter(|(name, _)| !VALUES.contains(name)) {
                    self.collect(value, &own);
                }
            }
            _ => {}
        }
    }

    /// The schema that `reference` leads to from a schema whose base is `base`.
    ///
    /// A pointer that leads nowhere from the schema with the nearest identifier is read from the document's
    /// root: old generators write identifiers that no reference means.
    pub(super) fn resolve(&self, reference: &str, base: &str) -> Option<Target<'a>> {
        let nearest = self.resolve_from(reference, base);
        if nearest.is_some() || !reference.starts_with("#/") {
            return nearest;
        }
        self.resolve_from(reference, &self.root_base)
    }

    fn resolve_from(&self, reference: &str, base: &str) -> Option<Target<'a>> {
        let (address, fragment) = reference.split_once('#').unwrap_or((reference, ""));
        let address = if address.is_empty() { base.to_owned() } else { join(base, address) };
        let resource =
            if address == self.root_base { self.root } else { self.by_identifier.get(&address).copied()? };
        let fragment = percent_decode_str(fragment).decode_utf8().ok()?;
        if fragment.is_empty() {
            Some(Target { schema: resource, base: address })
        } else if let Some(pointer) = fragment.strip_prefix('/') {
            follow(Target { schema: resource, base: address }, pointer)
        } else {
            let (schema, base) = self.by_anchor.get(&(address, fragment.into_owned()))?;
            Some(Target { schema, base: base.clone() })
        }
    }
}

fn follow<'a>(from: Target<'a>, pointer: &str) -> Option<Target<'a>> {
    let Target { mut schema, mut base } = from;
    for segment in pointer.split('/') {
        schema = match schema {
            Json::Object(members) => members.get(&segment.replace("~1", "/").replace("~0", "~"))?,
            Json::Array(list) => list.get(segment.parse::<usize>().ok()?)?,
            _ => return None,
        };
        base = base_of(schema, &base);
    }
    Some(Target { schema, base })
}

fn identifier(json: &Json) -> Option<&str> {
    let members = json.as_object()?;
    members.get("$id").or_else(|| members.get("id")).and_then(Json::as_str)
}

/// The base inside of a schema that stands where `base` holds.
pub(super) fn base_of(schema: &Json, base: &str) -> String {
    match identifier(schema).map(|id| id.split('#').next().unwrap_or_default()) {
        None | Some("") => base.to_owned(),
        Some(id) => join(base, id),
    }
}

/// Resolves a reference without a fragment against an address, as RFC 3986 (5.2) does for the forms that
/// schemas use.
fn join(base: &str, reference: &str) -> String {
    let scheme_end = |text: &str| {
        let end = text.find(':')?;
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"+-.".contains(&b);
        (end > 0 && text.as_bytes()[0].is_ascii_alphabetic() && text[..end].bytes().all(plain)).then_some(end)
    };
    if scheme_end(reference).is_some() {
        return reference.to_owned();
    }
    let after_scheme = scheme_end(base).map_or(0, |end| end + 1);
    if reference.starts_with("//") {
        return format!("{}{reference}", &base[..after_scheme]);
    }
    let path_start = match base[after_scheme..].strip_prefix("//") {
        Some(rest) => after_scheme + 2 + rest.find('/').unwrap_or(rest.len()),
        None => after_scheme,
    };
    let (origin, path) = base.split_at(path_start);
    let folder =
        if reference.starts_with('/') { "" } else { path.rsplit_once('/').map_or("", |(folder, _)| folder) };
    let joined = match (reference.strip_prefix('/'), folder.is_empty() && !path.starts_with('/')) {
        (Some(absolute), _) => format!("/{absolute}"),
        (None, true) => reference.to_owned(),
        (None, false) => format!("{folder}/{reference}"),
    };
    let mut segments: Vec<&str> = Vec::new();
    for segment in joined.split('/') {
        match segment {
            "." => {}
            ".." if segments.len() > 1 => {
                segments.pop();
            }
            segment => segments.push(segment),
        }
    }
    let slash =
        if !origin.is_empty() && !joined.starts_with('/') && origin.contains("//") { "/" } else { "" };
    format!("{origin}{slash}{}", segments.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_join_as_in_rfc_3986() {
        for (base, reference, joined) in [
            ("", "item", "item"),
            ("http://a/b/c", "d", "http://a/b/d"),
            ("http://a/b/c", "../d", "http://a/d"),
            ("http://a/b/c", "/d", "http://a/d"),
            ("http://a", "d", "http://a/d"),
            ("http://a/b", "//c/d", "http://c/d"),
            ("http://a/b", "urn:x:y", "urn:x:y"),
            ("x/y.json", "z.json", "x/z.json"),
            ("/schemas/a", "b", "/schemas/b"),
        ] {
            assert_eq!(join(base, reference), joined, "{base} {reference}");
        }
    }

    #[test]
    fn pointers_anchors_and_identifiers_lead_to_their_schema() {
        let text = r##"{"$id": "http://a/root", "$defs": {
            "a/b~c é": {"const": 1},
            "named": {"$anchor": "here", "const": 2},
            "old": {"$id": "#old", "const": 3},
            "other": {"$id": "other.json", "$defs": {"inner": {"$anchor": "here", "const": 4}}},
            "list": {"anyOf": [{"const": 5}]}}}"##;
        let json = Json::parse(text).unwrap();
        let references = References::new(&json);
        for (reference, value) in [
            ("#/$defs/a~1b~0c%20%C3%A9", "1"),
            ("#here", "2"),
            ("#old", "3"),
            ("http://a/root#here", "2"),
            ("other.json#here", "4"),
            ("/other.json#/$defs/inner", "4"),
            ("#/$defs/list/anyOf/0", "5"),
        ] {
            let target = references.resolve(reference, "http://a/root").unwrap();
            let Some(Json::Number(number)) = target.schema.as_object().unwrap().get("const") else {
                panic!()
            };
            assert_eq!(number.text(), value, "{reference}");
        }
        for reference in
            ["#/none", "#none", "none.json", "http://b/c", "file:///etc/hostname", "#/$defs/list/anyOf/7"]
        {
            assert!(references.resolve(reference, "http://a/root").is_none(), "{reference}");
        }
    }
}
