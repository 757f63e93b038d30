//! Rules for arguments that are no JSON: each declared parameter in its order, its value by its type.

use serde_json::{Map, Value, json};

use super::{DeclaredFunction, LarkRules, literal};
use crate::error::ApiError;
use crate::tools::functions::SchemaTypes;

/// How deep the types of a value are followed; what is deeper may have any type.
const MAX_VALUE_DEPTH: usize = 8;

/// Adds the rules of values.
pub(super) struct ValueRules<'a> {
    pub(super) rules: &'a mut LarkRules,
    /// Around strings in Gemma's notation.
    pub(super) mark: Option<&'static str>,
}

/// A schema inside the parameters of a function.
#[derive(Clone, Copy)]
struct Nested<'a> {
    schema: &'a Value,
    /// The parameters, to which references are relative.
    root: &'a Value,
    depth: usize,
}

/// A parameter or a member.
struct Declared<'a> {
    name: &'a str,
    schema: &'a Value,
    required: bool,
}

impl ValueRules<'_> {
    /// The parameters of a function in Qwen's XML.
    pub(super) fn xml(&mut self, function: &DeclaredFunction<'_>) -> Result<String, ApiError> {
        let root = &function.parameters;
        let mut body = Vec::new();
        for (number, declared) in declared_parameters(function)?.iter().enumerate() {
            if self.rules.is_full() {
                break;
            }
            if declared.name.contains(['<', '>', '\n']) {
                return Err(ApiError::field(
                    &format!("{}.properties", function.field),
                    format!("{:?} cannot be written as the name of a parameter by this model", declared.name),
                ));
            }
            let rule = format!("args_{}_{number}", function.index);
            let value = self.xml_value(&rule, Nested { schema: declared.schema, root, depth: 0 });
            let begin = literal(&format!("<parameter={}>\n", declared.name));
            self.rules.add(&rule, &format!("{begin} {value}"));
            body.push(if declared.required { rule } else { format!("{rule}?") });
        }
        Ok(if body.is_empty() { literal("") } else { body.join(" ") })
    }

    /// A value with the end tag of its parameter.
    fn xml_value(&mut self, rule: &str, nested: Nested<'_>) -> String {
        let end = "\n</parameter>\n";
        if let Some(texts) = listed_texts(nested.schema) {
            let texts: Vec<String> = texts.iter().map(|text| literal(text)).collect();
            return format!("({}) {}", texts.join(" | "), literal(end));
        }
        let types = SchemaTypes::of(nested.schema, nested.root);
        if types.string || types == SchemaTypes::default() {
            // Ends with the first end tag, so that no value holds it.
            self.rules.add_once(&format!("text[suffix={}]: /(.|\\n)*/", literal(end)));
            return "text".to_owned();
        }
        let value = self.json_value(rule, nested);
        format!("{value} {}", literal(end))
    }

    /// A rule for a value that is JSON, with the definitions that it refers to; its name. They are copied
    /// only while there is room for rules.
    fn json_value(&mut self, rule: &str, nested: Nested<'_>) -> String {
        let name = format!("{rule}_json");
        if self.rules.is_full() { name } else { self.rules.json(&name, &standalone(nested)) }
    }

    /// The arguments of a function in Gemma's notation, without their braces.
    pub(super) fn gemma(&mut self, function: &DeclaredFunction<'_>) -> Result<String, ApiError> {
        let declared = declared_parameters(function)?;
        let rule = format!("args_{}", function.index);
        let root = &function.parameters;
        Ok(self.members(&rule, &declared, Nested { schema: root, root, depth: 0 }))
    }

    /// Members in their order, with commas between those that are there.
    fn members(&mut self, rule: &str, declared: &[Declared<'_>], parent: Nested<'_>) -> String {
        if declared.is_empty() {
            return literal("");
        }
        for (number, member) in declared.iter().enumerate() {
            if self.rules.is_full() {
                break;
            }
            let value_rule = format!("{rule}_{number}");
            let nested = Nested { schema: member.schema, depth: parent.depth + 1, ..parent };
            let value = self.value(&value_rule, nested);
            self.rules.add(&value_rule, &format!("{} {value}", literal(&format!("{}:", member.name))));
            // `first`: what may follow where no member came before; `more`: where one did.
            let is_last = number + 1 == declared.len();
            let next =
                |kind: &str| if is_last { literal("") } else { format!("{rule}_{kind}_{}", number + 1) };
            let (first, more) = (format!("{value_rule} {}", next("more")), next("more"));
            let more = format!("\",\" {value_rule} {more}");
            let skip =
                |kind: &str| if member.required { String::new() } else { format!(" | {}", next(kind)) };
            self.rules.add(&format!("{rule}_first_{number}"), &format!("{first}{}", skip("first")));
            if number > 0 {
                self.rules.add(&format!("{rule}_more_{number}"), &format!("{more}{}", skip("more")));
            }
        }
        format!("{rule}_first_0")
    }

    /// A value in Gemma's notation.
    fn value(&mut self, rule: &str, nested: Nested<'_>) -> String {
        let mark = literal(self.mark.unwrap_or_default());
        if let Some(texts) = listed_texts(nested.schema) {
            let texts: Vec<String> = texts.iter().map(|text| literal(text)).collect();
            return format!("{mark} ({}) {mark}", texts.join(" | "));
        }
        let types = SchemaTypes::of(nested.schema, nested.root);
        let scalar = !(types.string || types.object || types.array);
        let only = |only: SchemaTypes| types == only;
        if nested.depth >= MAX_VALUE_DEPTH || types == SchemaTypes::default() {
            self.any()
        } else if scalar {
            self.json_value(rule, nested)
        } else if only(SchemaTypes { string: true, ..SchemaTypes::default() }) {
            self.text()
        } else if only(SchemaTypes { array: true, ..SchemaTypes::default() }) {
            let schema = nested.schema.get("items").unwrap_or(&Value::Null);
            let item =
                self.value(&format!("{rule}_item"), Nested { schema, depth: nested.depth + 1, ..nested });
            let item_rule = format!("{rule}_item");
            self.rules.add(&item_rule, &item);
            format!("\"[\" ({item_rule} (\",\" {item_rule})*)? \"]\"")
        } else if let Some(declared) =
            declared_members(nested.schema).filter(|_| types.object && !types.string)
        {
            let members = self.members(&format!("{rule}_of"), &declared, nested);
            format!("\"{{\" {members} \"}}\"")
        } else {
            self.any()
        }
    }

    /// A string between marks; it ends with the first mark, so that none holds it.
    fn text(&mut self) -> String {
        let mark = literal(self.mark.unwrap_or_default());
        self.rules.add_once(&format!("text[suffix={mark}]: /(.|\\n)*/"));
        self.rules.add_once(&format!("string: {mark} text"));
        "string".to_owned()
    }

    /// A value of any type.
    fn any(&mut self) -> String {
        self.text();
        let scalar = json!({"type": ["number", "boolean", "null"]});
        self.rules.add_once(&format!("scalar: %json {scalar}"));
        self.rules.add_once("any: string | scalar | any_list | any_object");
        self.rules.add_once("any_list: \"[\" (any (\",\" any)*)? \"]\"");
        self.rules.add_once("any_object: \"{\" (any_member (\",\" any_member)*)? \"}\"");
        self.rules.add_once("any_member: /[A-Za-z_][A-Za-z0-9_]*/ \":\" any");
        "any".to_owned()
    }
}

/// The parameters of a function; an error where the schema says it otherwise than by `properties`.
fn declared_parameters<'a>(function: &'a DeclaredFunction<'_>) -> Result<Vec<Declared<'a>>, ApiError> {
    let schema = &function.parameters;
    let indirect =
        ["$ref", "anyOf", "oneOf", "allOf"].into_iter().find(|keyword| schema.get(keyword).is_some());
    if let Some(keyword) = indirect {
        let why =
            format!("{keyword:?} is not supported at the top where a call is required; write \"properties\"");
        return Err(ApiError::field(&function.field, why));
    }
    Ok(declared_members(schema).unwrap_or_default())
}

/// The members that a schema declares, where it declares any.
fn declared_members(schema: &Value) -> Option<Vec<Declared<'_>>> {
    let properties: &Map<String, Value> = schema.get("properties")?.as_object()?;
    let required: Vec<&str> = schema
        .get("required")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    let declared = properties.iter().map(|(name, schema)| Declared {
        name,
        schema,
        required: required.contains(&name.as_str()),
    });
    Some(declared.collect())
}

/// The texts of a schema that lists nothing else.
fn listed_texts(schema: &Value) -> Option<Vec<&str>> {
    let listed: Vec<&Value> = match (schema.get("enum").and_then(Value::as_array), schema.get("const")) {
        (Some(list), _) => list.iter().collect(),
        (None, Some(value)) => vec![value],
        (None, None) => return None,
    };
    let texts: Option<Vec<&str>> = listed.into_iter().map(Value::as_str).collect();
    texts.filter(|texts| !texts.is_empty())
}

/// A schema with the definitions that its references lead to.
fn standalone(nested: Nested<'_>) -> Value {
    let mut schema = nested.schema.clone();
    if let Some(members) = schema.as_object_mut() {
        for keyword in ["$defs", "definitions"] {
            if let Some(definitions) = nested.root.get(keyword) {
                members.entry(keyword).or_insert_with(|| definitions.clone());
            }
        }
    }
    schema
}
