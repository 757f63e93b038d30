//! One operation of the document: what a row of the table of surfaces says, and the description of its body
//! and of its answers.

use serde_json::{Map, Value, json};

use super::failures;
use super::schema::{sha256, text_within};
use crate::priority::PRIORITY_HEADER;
use crate::revision::{DIGEST_HEADER, REVISION_HEADER};
use crate::surfaces::{Endpoint, HttpMethod, Kind, ModelPlace, Surface};
use crate::tenant::TENANT_HEADER;

/// JSON.
pub(super) const JSON: &str = "application/json";
/// Server-sent events.
pub(super) const EVENTS: &str = "text/event-stream";
/// JSON that is followed by the bytes of tensors.
pub(super) const OCTETS: &str = "application/octet-stream";

/// What is described of a surface beside its row.
pub(super) struct Operation {
    /// The name of the row.
    pub(super) surface: &'static str,
    /// What it does, in a few words.
    pub(super) summary: &'static str,
    /// The schema of its JSON body; none where it takes no body.
    pub(super) body: Option<Value>,
    /// Whether the body may be left out.
    body_is_optional: bool,
    /// Whether the body may also be JSON that is followed by bytes.
    takes_octets: bool,
    /// The answers that are no errors of a request.
    pub(super) answers: Vec<DescribedAnswer>,
}

/// An answer.
pub(super) struct DescribedAnswer {
    status: u16,
    what: &'static str,
    /// Its forms: a media type and a schema each.
    contents: Vec<AnswerForm>,
}

struct AnswerForm {
    media_type: &'static str,
    schema: Value,
}

impl DescribedAnswer {
    /// An answer in JSON.
    pub(super) fn json(status: u16, what: &'static str, schema: Value) -> Self {
        Self { status, what, contents: vec![AnswerForm { media_type: JSON, schema }] }
    }

    /// An answer without content.
    pub(super) fn empty(status: u16, what: &'static str) -> Self {
        Self { status, what, contents: Vec::new() }
    }

    /// The same in a further form.
    pub(super) fn or(mut self, media_type: &'static str, schema: Value) -> Self {
        self.contents.push(AnswerForm { media_type, schema });
        self
    }
}

/// One event of a stream; `each` says what its data are.
pub(super) fn events(each: &str) -> Value {
    let data = json!({"type": "string", "description": "JSON, or [DONE]."});
    let name = json!({"type": "string", "description": "Where the protocol names its events."});
    json!({
        "type": "object",
        "required": ["data"],
        "properties": {"event": name, "data": data},
        "description": each,
    })
}

impl Operation {
    /// An operation with one answer.
    pub(super) fn new(surface: &'static str, summary: &'static str, answer: DescribedAnswer) -> Self {
        Self {
            surface,
            summary,
            body: None,
            body_is_optional: false,
            takes_octets: false,
            answers: vec![answer],
        }
    }

    /// With a JSON body of this schema.
    pub(super) fn body(self, schema: Value) -> Self {
        Self { body: Some(schema), ..self }
    }

    /// With a JSON body that may be left out.
    pub(super) fn optional_body(self, schema: Value) -> Self {
        Self { body: Some(schema), body_is_optional: true, ..self }
    }

    /// Its body may also be JSON that is followed by bytes.
    pub(super) fn or_octets(self) -> Self {
        Self { takes_octets: true, ..self }
    }

    /// With one more answer.
    pub(super) fn answer(mut self, answer: DescribedAnswer) -> Self {
        self.answers.push(answer);
        self
    }

    /// The operation at one row, with everything that follows from the row.
    pub(super) fn at(&self, surface: &Surface) -> Value {
        let mut responses = Map::new();
        for answer in &self.answers {
            responses.insert(answer.status.to_string(), response(surface, answer));
        }
        for failure in failures::of(surface, self.body.is_some()) {
            // Health answers with a status of its own.
            responses.entry(failure.status.to_string()).or_insert_with(|| failure.describe(surface.errors));
        }
        let mut operation = json!({
            "operationId": operation_id(surface),
            "summary": self.summary,
            "tags": [tag(surface)],
            "parameters": parameters(surface),
        });
        if let Some(body) = &self.body {
            let mut content = json!({JSON: {"schema": body}});
            if self.takes_octets {
                content[OCTETS] = json!({"schema": {"type": "string", "format": "binary"}});
            }
            operation["requestBody"] = json!({"required": !self.body_is_optional, "content": content});
        }
        responses.sort_keys();
        operation["responses"] = responses.into();
        operation
    }
}

/// The name of an operation, which the names of functions in generated clients follow. An alias has one of
/// its own.
pub(super) fn operation_id(surface: &Surface) -> String {
    match surface.http_path() {
        Some(path) if surface.is_alias() && path.starts_with("/openai/") => {
            format!("openai_{}", surface.name)
        }
        Some(_) if surface.is_alias() => format!("{}_of_version", surface.name),
        _ => surface.name.to_owned(),
    }
}

fn tag(surface: &Surface) -> &'static str {
    let path = surface.http_path().unwrap_or_default();
    let rules = [
        ("/v2", "KServe v2"),
        ("/openai/", "OpenAI"),
        ("/v1/chat/", "OpenAI"),
        ("/v1/completions", "OpenAI"),
        ("/v1/responses", "OpenAI"),
        ("/v1/embeddings", "OpenAI"),
        ("/v1/messages", "Anthropic"),
        ("/v1/", "trustformers"),
    ];
    rules.into_iter().find(|(prefix, _)| path.starts_with(prefix)).map_or("server", |(_, tag)| tag)
}

/// The method as the document writes it.
pub(super) fn method(surface: &Surface) -> Option<&'static str> {
    match surface.endpoint {
        Endpoint::Http { method: HttpMethod::Get, .. } => Some("get"),
        Endpoint::Http { method: HttpMethod::Post, .. } => Some("post"),
        Endpoint::Grpc { .. } => None,
    }
}

fn parameters(surface: &Surface) -> Vec<Value> {
    let path = surface.http_path().unwrap_or_default();
    let named = ["model", "version"].into_iter().filter(|name| path.contains(&format!("{{{name}}}")));
    let mut parameters: Vec<Value> =
        named.map(|name| json!({"$ref": format!("#/components/parameters/{name}")})).collect();
    if surface.task.is_some() && surface.kind != Kind::Upgrade {
        let headers = [PRIORITY_HEADER, TENANT_HEADER, REVISION_HEADER];
        parameters.extend(headers.map(|name| json!({"$ref": format!("#/components/parameters/{name}")})));
    }
    parameters
}

/// The parameters that operations share.
pub(super) fn shared_parameters() -> Value {
    let path = |name: &str, description: &str| {
        let schema = json!({"type": "string", "minLength": 1});
        json!({"name": name, "in": "path", "required": true, "description": description, "schema": schema})
    };
    let header = |name: &str, description: &str, schema: Value| {
        let place = "header";
        json!({"name": name, "in": place, "description": description, "schema": schema})
    };
    let visible = |most: usize| json!({"type": "string", "pattern": "^[!-~]+$", "maxLength": most});
    let tenant = text_within(0, 256);
    json!({
        "model": path("model", "One of a model's names; a slash in it may be written as it is or as %2F."),
        "version": path("version", "The revision of the model."),
        PRIORITY_HEADER: header(
            PRIORITY_HEADER,
            "The priority class, where the body gives none.",
            json!({"type": "string", "enum": ["high", "normal", "low"]}),
        ),
        TENANT_HEADER: header(TENANT_HEADER, "The tenant that the request belongs to.", tenant),
        REVISION_HEADER: header(REVISION_HEADER, "The revision that must answer.", visible(256)),
    })
}

fn response(surface: &Surface, answer: &DescribedAnswer) -> Value {
    let mut headers = json!({"x-request-id": {"$ref": "#/components/headers/x-request-id"}});
    if surface.task.is_some() && !matches!(surface.model, ModelPlace::FirstMessage { .. }) {
        for name in [REVISION_HEADER, DIGEST_HEADER] {
            headers[name] = json!({"$ref": format!("#/components/headers/{name}")});
        }
    }
    let mut response = json!({"description": answer.what, "headers": headers});
    if !answer.contents.is_empty() {
        let content: Map<String, Value> = (answer.contents.iter())
            .map(|content| (content.media_type.to_owned(), json!({"schema": content.schema})))
            .collect();
        response["content"] = content.into();
    }
    response
}

/// The headers of answers that operations share.
pub(super) fn shared_headers() -> Value {
    let header = |description: &str, schema: Value| json!({"description": description, "schema": schema});
    let text = || json!({"type": "string"});
    let seconds = json!({"type": "integer", "minimum": 0});
    json!({
        "x-request-id": header("The id of the request: the caller's own, or a new one.", text()),
        "retry-after": header("Seconds after which another attempt makes sense.", seconds),
        REVISION_HEADER: header("The revision that answered, where it has a name.", text()),
        DIGEST_HEADER: header("sha256 of the weights that answered.", sha256()),
    })
}
