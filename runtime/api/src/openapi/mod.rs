//! `GET /openapi.json`: the description of the HTTP routes, for people, generators of clients and tests.
//!
//! Paths, methods, parameters and errors follow from the table of surfaces ([`crate::surfaces`]); bodies and
//! answers are described here, a file for each protocol. Tests compare both ways: every row has a
//! description, and every description a row and the fields that its codec reads.

mod anthropic;
mod failures;
mod kserve;
mod native;
#[cfg(test)]
mod null_members;
mod openai;
mod operation;
mod responses;
mod schema;
mod scores;

use axum::Router;
use axum::body::Bytes;
use axum::http::header::CONTENT_TYPE;
use axum::routing::get;
use serde_json::{Map, Value, json};

use crate::Api;
use crate::surfaces::SURFACES;
use operation::Operation;

/// `GET /openapi.json`.
pub(crate) fn router() -> Router<Api> {
    let document = Bytes::from(document().to_string());
    let answer = move || {
        let document = document.clone();
        async move { ([(CONTENT_TYPE, operation::JSON)], document) }
    };
    Router::new().route("/openapi.json", get(answer))
}

/// Everything that is described of surfaces.
fn operations() -> Vec<Operation> {
    let all = [
        native::operations,
        openai::operations,
        responses::operations,
        anthropic::operations,
        kserve::operations,
    ];
    all.into_iter().flat_map(|of| of()).collect()
}

/// Every named schema.
fn schemas() -> Map<String, Value> {
    let all = [
        failures::schemas(),
        native::schemas(),
        openai::schemas(),
        responses::schemas(),
        anthropic::schemas(),
        kserve::schemas(),
    ];
    all.into_iter().flatten().map(|(name, schema)| (name.to_owned(), schema)).collect()
}

/// The document, in OpenAPI 3.1.
#[must_use]
pub fn document() -> Value {
    let operations = operations();
    let mut paths: Map<String, Value> = Map::new();
    for surface in SURFACES {
        let (Some(path), Some(method)) = (surface.http_path(), operation::method(surface)) else { continue };
        let Some(described) = operations.iter().find(|operation| operation.surface == surface.name) else {
            continue;
        };
        let item = paths.entry(path).or_insert_with(|| json!({}));
        item[method] = described.at(surface);
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "trustformers-serve",
            "description": "Inference of transformer models. Errors have the form of the asked protocol.",
            "version": env!("CARGO_PKG_VERSION"),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": schemas(),
            "parameters": operation::shared_parameters(),
            "headers": operation::shared_headers(),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{Fake, Script};
    use crate::surfaces::{Endpoint, Surface};
    use axum::body::Body;
    use axum::http::Request;
    use http_body_util::BodyExt;
    use std::collections::BTreeSet;
    use tower::ServiceExt;

    fn http_rows() -> impl Iterator<Item = &'static Surface> {
        SURFACES.iter().filter(|surface| matches!(surface.endpoint, Endpoint::Http { .. }))
    }

    #[test]
    fn every_row_is_described_and_every_description_has_a_row() {
        let rows: BTreeSet<&str> = http_rows().map(|surface| surface.name).collect();
        let described: Vec<&str> = operations().iter().map(|operation| operation.surface).collect();
        let once: BTreeSet<&str> = described.iter().copied().collect();
        assert_eq!(rows, once);
        assert_eq!(described.len(), once.len(), "a surface is described twice");
        let document = document();
        for surface in http_rows() {
            let path = surface.http_path().unwrap();
            let method = operation::method(surface).unwrap();
            assert!(document["paths"][path][method].is_object(), "{method} {path}");
        }
        let operations: usize =
            document["paths"].as_object().unwrap().values().map(|item| item.as_object().unwrap().len()).sum();
        assert_eq!(operations, http_rows().count());
    }

    #[test]
    fn names_of_operations_are_unique() {
        let names: Vec<String> = http_rows().map(operation::operation_id).collect();
        assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len(), "{names:?}");
    }

    /// Every `$ref` below a value.
    fn references(value: &Value, found: &mut BTreeSet<String>) {
        match value {
            Value::Object(members) => {
                found.extend(members.get("$ref").and_then(Value::as_str).map(str::to_owned));
                members.values().for_each(|value| references(value, found));
            }
            Value::Array(items) => items.iter().for_each(|value| references(value, found)),
            _ => {}
        }
    }

    #[test]
    fn every_reference_leads_somewhere_and_every_schema_is_used() {
        let document = document();
        let mut used = BTreeSet::new();
        references(&document, &mut used);
        for reference in &used {
            let found = document.pointer(reference.strip_prefix('#').unwrap());
            assert!(found.is_some(), "{reference}");
        }
        for name in document["components"]["schemas"].as_object().unwrap().keys() {
            assert!(used.contains(&format!("#/components/schemas/{name}")), "{name} is not used");
        }
    }

    #[test]
    fn members_of_requests_are_the_fields_that_the_codecs_read() {
        let listed: BTreeSet<&str> = codec_fields().into_iter().map(|(surface, _)| surface).collect();
        let with_body = operations().into_iter().filter(|operation| operation.body.is_some());
        let with_body: BTreeSet<&str> = with_body.map(|operation| operation.surface).collect();
        let open: BTreeSet<&str> = OPEN_BODIES.iter().copied().collect();
        assert_eq!(listed.union(&open).copied().collect::<BTreeSet<_>>(), with_body);
        assert!(listed.is_disjoint(&open));
        for surface in open {
            let operation = operations().into_iter().find(|operation| operation.surface == surface).unwrap();
            let body = resolved(&operation.body.unwrap());
            assert_ne!(body["additionalProperties"], false, "{surface}: its fields can be listed");
        }
        for (surface, fields) in codec_fields() {
            let operation = operations().into_iter().find(|operation| operation.surface == surface).unwrap();
            let body = resolved(&operation.body.unwrap());
            let described: BTreeSet<String> =
                body["properties"].as_object().unwrap().keys().cloned().collect();
            let read: BTreeSet<String> = fields.into_iter().map(str::to_owned).collect();
            assert_eq!(described, read, "{surface}");
        }
    }

    /// Surfaces whose bodies may have any member: parameters stand beside the text.
    const OPEN_BODIES: &[&str] = &["kserve_generate", "kserve_generate_stream"];

    /// The fields that each codec reads, of every other surface with a body.
    fn codec_fields() -> Vec<(&'static str, Vec<&'static str>)> {
        vec![
            ("generate", crate::http::generate::generate_fields()),
            ("generate_stream", crate::http::generate::generate_fields()),
            ("embeddings", crate::embed::FIELDS.to_vec()),
            ("classify", crate::classify::FIELDS.to_vec()),
            ("rerank", crate::rerank::FIELDS.to_vec()),
            ("chat_completions", crate::openai::chat::FIELDS.names()),
            ("completions", crate::openai::completions::FIELDS.names()),
            ("responses", crate::responses::request::fields()),
            ("messages", crate::anthropic::request::fields()),
            ("count_tokens", crate::anthropic::request::fields()),
            ("kserve_infer", crate::kserve::json::REQUEST_FIELDS.to_vec()),
            ("load_model", crate::model_control::LOAD_FIELDS.to_vec()),
            ("unload_model", crate::model_control::UNLOAD_FIELDS.to_vec()),
            ("swap_model", crate::model_control::SWAP_FIELDS.to_vec()),
            ("rollback_model", crate::model_control::ROLLBACK_FIELDS.to_vec()),
            ("kserve_index", crate::kserve::http::INDEX_FIELDS.to_vec()),
        ]
    }

    /// A schema, or the one that it refers to.
    fn resolved(schema: &Value) -> Value {
        match schema.get("$ref").and_then(Value::as_str) {
            Some(reference) => schemas()[reference.rsplit('/').next().unwrap()].clone(),
            None => schema.clone(),
        }
    }

    #[tokio::test]
    async fn the_document_is_served() {
        let fake = Fake::with(Script::tokens(&[]));
        let request = Request::get("/openapi.json").body(Body::empty()).unwrap();
        let response = crate::http::router(fake.api()).oneshot(request).await.unwrap();
        assert_eq!(response.headers()["content-type"], "application/json");
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        let found: Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(found, document());
        assert_eq!(found["openapi"], "3.1.0");
    }
}
