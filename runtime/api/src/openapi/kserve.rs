//! KServe v2 over HTTP: servers, models and inference in tensors.

use serde_json::{Value, json};

use super::operation::{DescribedAnswer, EVENTS, OCTETS, Operation, events};
use super::schema::{
    any_object, any_of, count, flag, list, nullable, object, open_object, reference, text, word,
};

/// Types of tensors.
const DATATYPES: &[&str] = &[
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "BF16", "FP32",
    "FP64", "BYTES",
];

/// The operations.
pub(super) fn operations() -> Vec<Operation> {
    let generated = || DescribedAnswer::json(200, "The text.", reference("KserveText"));
    let infer = DescribedAnswer::json(200, "The outputs.", reference("InferAnswer"))
        .or(OCTETS, json!({"type": "string", "format": "binary"}));
    let mut operations = about();
    operations.extend([
        Operation::new("kserve_infer", "Asks a model in tensors", infer)
            .body(reference("InferRequest"))
            .or_octets(),
        Operation::new("kserve_generate", "Continues a text", generated())
            .body(reference("KserveTextRequest")),
        Operation::new(
            "kserve_generate_stream",
            "Continues a text, as a stream",
            DescribedAnswer::empty(200, "The text in parts.")
                .or(EVENTS, events("Each event has one part of the text, as KserveText describes it.")),
        )
        .body(reference("KserveTextRequest")),
    ]);
    operations
}

/// What describes servers and models.
fn about() -> Vec<Operation> {
    let verdict = |name: &'static str| {
        let schema = open_object().required(name, flag("Yes or no.")).build();
        [
            DescribedAnswer::json(200, "Yes.", schema),
            DescribedAnswer::json(503, "Not now.", reference("KserveError")),
        ]
    };
    let yes_or_no = |surface, summary, name| {
        let [yes, no] = verdict(name);
        Operation::new(surface, summary, yes).answer(no)
    };
    let json = |surface, summary, what, schema: &str| {
        Operation::new(surface, summary, DescribedAnswer::json(200, what, reference(schema)))
    };
    let index = DescribedAnswer::json(200, "The models.", list(reference("KserveIndexEntry")));
    vec![
        json("kserve_server", "What the server is", "The server.", "KserveServer"),
        yes_or_no("kserve_live", "Whether the process makes progress", "live"),
        yes_or_no("kserve_ready", "Whether requests may come", "ready"),
        json("kserve_model", "The tensors of a model", "The model.", "KserveModel"),
        yes_or_no("kserve_model_ready", "Whether a model takes requests", "ready"),
        json("kserve_config", "The configuration of a model", "The configuration.", "KserveConfig"),
        json("kserve_statistics", "Counts of a model", "The counts.", "KserveStatistics"),
        json("kserve_all_statistics", "Counts of all models", "The counts.", "KserveStatistics"),
        Operation::new("kserve_index", "Lists the models", index).optional_body(index_request()),
    ]
}

/// The schemas, by name.
pub(super) fn schemas() -> Vec<(&'static str, Value)> {
    vec![
        ("KserveServer", server()),
        ("KserveModel", model()),
        ("KserveConfig", config()),
        ("KserveStatistics", statistics()),
        ("KserveIndexEntry", index_entry()),
        ("InferRequest", infer_request()),
        ("InferAnswer", infer_answer()),
        ("KserveTextRequest", text_request()),
        ("KserveText", text_answer()),
        ("KserveParameters", parameters()),
    ]
}

fn server() -> Value {
    open_object()
        .required("name", text("The name of the server."))
        .required("version", text("Its version."))
        .required("extensions", list(text("An extension of the protocol.")))
        .build()
}

fn datatype() -> Value {
    word(DATATYPES, "The type of the values.")
}

fn model() -> Value {
    let tensor = open_object()
        .required("name", text("The name of the tensor."))
        .required("datatype", datatype())
        .required("shape", list(json!({"type": "integer", "minimum": -1})))
        .build();
    open_object()
        .required("name", text("The model's name."))
        .required("versions", list(text("A version.")))
        .required("platform", text("What runs it."))
        .required("inputs", list(tensor.clone()))
        .required("outputs", list(tensor))
        .sometimes("properties", any_object("What else there is to know."))
        .build()
}

fn config() -> Value {
    open_object()
        .required("name", text("The model's name."))
        .required("backend", text("What runs it."))
        .required("max_batch_size", count("Always 0: requests are batched whatever their shape."))
        .required("input", list(any_object("An input.")))
        .required("output", list(any_object("An output.")))
        .build()
}

fn statistics() -> Value {
    let each = open_object()
        .required("name", text("The model's name."))
        .required("version", text("Its version."))
        .build();
    open_object().required("model_stats", list(each)).build()
}

fn index_request() -> Value {
    object().optional("ready", flag("Whether only models that take requests are listed.")).build()
}

fn index_entry() -> Value {
    open_object()
        .required("name", text("The model's name."))
        .required("version", text("Its version."))
        .required("state", word(&["READY", "LOADING", "UNLOADING", "UNAVAILABLE"], "Its state."))
        .required("reason", text("Why it is in this state."))
        .build()
}

fn parameters() -> Value {
    let value = any_of([
        json!({"type": ["string", "boolean", "number", "null"]}),
        json!({"type": ["array", "object"]}),
    ]);
    json!({"type": ["object", "null"], "additionalProperties": value})
}

fn infer_request() -> Value {
    let input = object()
        .required("name", text("The name of the tensor."))
        .required("shape", list(json!({"type": "integer", "minimum": 0})))
        .required("datatype", datatype())
        .optional("parameters", reference("KserveParameters"))
        .optional(
            "data",
            json!({"type": "array", "description": "The values; left out where they follow the JSON."}),
        )
        .build();
    let output = object()
        .required("name", text("The name of the tensor."))
        .optional("parameters", reference("KserveParameters"))
        .build();
    object()
        .optional("id", text("Repeated by the answer."))
        .optional("model_name", text("The model of the path."))
        .optional("parameters", reference("KserveParameters"))
        .required("inputs", list(input))
        .optional("outputs", list(output))
        .build()
}

fn infer_answer() -> Value {
    let output = open_object()
        .required("name", text("The name of the tensor."))
        .required("datatype", datatype())
        .required("shape", list(count("A dimension.")))
        .sometimes("parameters", any_object("How many bytes follow the JSON."))
        .sometimes("data", json!({"type": "array"}))
        .build();
    open_object()
        .required("model_name", text("The model that answered."))
        .required("model_version", text("Its version."))
        .sometimes("id", text("The id of the request."))
        .sometimes("parameters", any_object("What else there is to know."))
        .required("outputs", list(output))
        .build()
}

/// Parameters may also stand beside the text.
fn text_request() -> Value {
    open_object()
        .sometimes("id", nullable(text("Repeated by the answer.")))
        .required(
            "text_input",
            json!({"type": "string", "minLength": 1, "description": "The text to continue."}),
        )
        .sometimes("parameters", reference("KserveParameters"))
        .build()
}

fn text_answer() -> Value {
    open_object()
        .required("text_output", text("The new text."))
        .required("model_name", text("The model that answered."))
        .required("model_version", text("Its version."))
        .sometimes("id", text("The id of the request."))
        .build()
}
