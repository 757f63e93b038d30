//! This server's own routes, the models, and health.

use serde_json::{Value, json};
use trustformers_proto::Task;

use super::operation::{DescribedAnswer, EVENTS, Operation, events};
use super::schema::{
    MAX_U32, ObjectSchema, any_object, any_of, constant, count, described, flag, list, list_of, nullable,
    number, number_above_0, number_within, object, open_object, reference, sha256, text, text_within, whole,
    word,
};
use crate::MAX_BODY_BYTES;

/// Most values of a request's lists that the engine takes.
const MAX_STOPS: usize = 16;
const MAX_STOP_TOKENS: usize = 64;
const MAX_TEXTS: usize = 2048;

/// The operations of these routes.
pub(super) fn operations() -> Vec<Operation> {
    let generated = DescribedAnswer::json(200, "The text.", reference("Generated"));
    let stream = "Each event has a token: `{\"text\", \"token\", \"logprobs\"?}`; the last one has what \
        GenerateEnd describes, then `[DONE]` follows. After an error event nothing follows.";
    let model = || DescribedAnswer::json(200, "The model.", reference("Model"));
    let mut operations = vec![
        Operation::new("generate", "Continues a text", generated.or(EVENTS, events(stream)))
            .body(reference("GenerateRequest")),
        Operation::new(
            "generate_stream",
            "Continues a text, as a stream of tokens",
            DescribedAnswer::empty(200, "The tokens.").or(EVENTS, events(stream)),
        )
        .body(reference("GenerateRequest")),
        Operation::new(
            "embeddings",
            "Turns texts into vectors",
            DescribedAnswer::json(200, "A vector for each text.", reference("Embeddings")),
        )
        .body(reference("EmbeddingsRequest")),
        Operation::new(
            "classify",
            "Gives texts the scores of a model's labels",
            DescribedAnswer::json(200, "The scores of each text.", reference("Classified")),
        )
        .body(reference("ClassifyRequest")),
        Operation::new(
            "rerank",
            "Orders documents by how well they answer a query",
            DescribedAnswer::json(200, "The documents, best first.", reference("Reranked")),
        )
        .body(reference("RerankRequest")),
        Operation::new(
            "list_models",
            "Lists the models and their states",
            DescribedAnswer::json(200, "The models.", reference("Models")),
        ),
        Operation::new("get_model", "One model and its state", model()),
        Operation::new("load_model", "Loads a model", model()).body(reference("LoadRequest")),
        Operation::new("unload_model", "Unloads a model", model()).body(reference("UnloadRequest")),
        Operation::new("swap_model", "Lets another version answer for a model", model())
            .body(reference("SwapRequest")),
        Operation::new("rollback_model", "Lets the version before the last swap answer again", model())
            .body(reference("RollbackRequest")),
        Operation::new(
            "stream",
            "Opens a WebSocket for several requests at a time",
            DescribedAnswer::empty(101, "The connection is a WebSocket."),
        ),
        Operation::new(
            "openapi",
            "This document",
            DescribedAnswer::json(200, "The document.", any_object("OpenAPI 3.1.")),
        ),
    ];
    let health = [
        ("health", "Whether requests may come"),
        ("health_ready", "Whether requests may come"),
        ("health_live", "Whether the process makes progress"),
        ("health_startup", "Whether loading is over"),
    ];
    operations.extend(health.map(|(surface, summary)| {
        Operation::new(surface, summary, DescribedAnswer::json(200, "Yes.", reference("Health")))
            .answer(DescribedAnswer::json(503, "Not now.", reference("Health")))
    }));
    operations
}

/// A priority class.
pub(super) fn priority() -> Value {
    word(&["high", "normal", "low"], "The priority class.")
}

/// The name of a model in a request.
pub(super) fn model_name() -> Value {
    text("The model's name. May be left out where one model alone serves the task.")
}

/// The ids of a prompt or of a text.
pub(super) fn token_ids(least: usize) -> Value {
    json!({"type": "array", "items": whole(0, MAX_U32, "A token id."), "minItems": least})
}

/// The fields about sampling and the end of an answer that this server has on all its routes for text.
pub(super) fn sampling(object: ObjectSchema) -> ObjectSchema {
    object
        .optional("top_k", whole(0, MAX_U32, "Samples from this many best tokens only; 0: from all."))
        .optional(
            "min_p",
            number_within(
                0.0,
                1.0,
                "Samples from tokens with at least this share of the best one's probability only.",
            ),
        )
        .optional(
            "typical_p",
            number_above_0(1.0, "Samples from the most typical tokens up to this share of probability only."),
        )
        .optional(
            "repetition_penalty",
            number_above_0(10.0, "Divides the logits of tokens that prompt or answer hold already."),
        )
        .optional(
            "presence_penalty",
            number_within(-2.0, 2.0, "Taken from the logit of each token of the answer."),
        )
        .optional(
            "frequency_penalty",
            number_within(-2.0, 2.0, "Taken from a logit as often as its token is in the answer."),
        )
        .optional("logit_bias", logit_bias())
        .optional("stop", stop())
        .optional(
            "stop_token_ids",
            list_of(0, MAX_STOP_TOKENS, whole(0, MAX_U32, "A token that ends the answer.")),
        )
}

/// Added to logits.
fn logit_bias() -> Value {
    let each = number_within(-100.0, 100.0, "Added to the logit of the token with this id.");
    json!({
        "type": "object",
        "propertyNames": {"pattern": "^[0-9]{1,9}$"},
        "additionalProperties": each,
        "maxProperties": 1024,
    })
}

fn stop() -> Value {
    let text = described(text_within(1, 1024), "Ends the answer and is not part of it.");
    any_of([text.clone(), list_of(0, MAX_STOPS, text)])
}

/// What an answer must look like, in this server's own forms.
pub(super) fn formats() -> Vec<Value> {
    let of = |kind: &str| object().required("type", constant(kind));
    let schema = || json!({"type": ["object", "boolean"], "description": "A JSON schema."});
    vec![
        of("text").build(),
        of("json_object").build(),
        of("json_schema").required("schema", schema()).build(),
        of("json_schema").required("json_schema", json_schema_format()).build(),
        of("regex")
            .required("regex", text("A regular expression that the answer matches as a whole."))
            .build(),
        of("grammar").required("grammar", text("A grammar in llguidance's variant of Lark.")).build(),
    ]
}

/// OpenAI's form of a format by schema.
pub(super) fn json_schema_format() -> Value {
    object()
        .optional("name", text("For models that read it."))
        .optional("description", text("For models that read it."))
        .required("schema", json!({"type": ["object", "boolean"], "description": "A JSON schema."}))
        .optional("strict", flag("Changes nothing: the schema always holds."))
        .build()
}

/// The schemas of these routes, by name.
pub(super) fn schemas() -> Vec<(&'static str, Value)> {
    let mut schemas = vec![
        ("GenerateRequest", generate_request()),
        ("Generated", generated()),
        ("EmbeddingsRequest", embeddings_request()),
        ("Embeddings", embeddings()),
        ("Model", model()),
        (
            "Models",
            open_object()
                .required("object", constant("list"))
                .required("data", list(reference("Model")))
                .build(),
        ),
        ("LoadRequest", load_request()),
        ("UnloadRequest", unload_request()),
        ("SwapRequest", swap_request()),
        ("RollbackRequest", rollback_request()),
        ("Health", health()),
        ("ResponseFormat", described(any_of(formats()), "What the answer must look like.")),
        ("Usage", usage()),
    ];
    schemas.extend(super::scores::schemas());
    schemas
}

fn generate_request() -> Value {
    let prompt = any_of([
        described(text_within(1, MAX_BODY_BYTES), "The text to continue."),
        described(token_ids(1), "The token ids to continue, used as they are."),
    ]);
    let own = object()
        .required("prompt", prompt)
        .optional("max_tokens", whole(1, MAX_U32, "New tokens at most; 100 where it is left out."))
        .optional("temperature", number_within(0.0, 100.0, "0 is greedy; left out: the model's, or 0.7."))
        .optional("top_p", number_above_0(1.0, "Nucleus of sampling; left out: the model's, or 0.9."))
        .optional("model", model_name())
        .optional("stream", flag("Whether the answer is a stream of events."))
        .optional("seed", whole(0, u64::MAX, "The same seed, prompt and settings give the same tokens."))
        .optional("priority", priority())
        .optional(
            "logprobs",
            whole(0, 20, "With each token its log probability and those of this many best ones."),
        )
        .optional("response_format", reference("ResponseFormat"));
    sampling(own).build()
}

fn generated() -> Value {
    let best = open_object()
        .required("token", count("A token id."))
        .required("logprob", number("The natural logarithm of its probability."))
        .build();
    let logprobs = open_object()
        .required("logprob", number("The natural logarithm of the token's probability."))
        .required("top", list(best))
        .build();
    let stopped_by = any_of([text("This one of stop."), count("This one of stop_token_ids.")]);
    open_object()
        .required("id", text("The id of the answer."))
        .required("model", text("The model that answered."))
        .required("text", text("The new text."))
        .required("tokens", list(count("The id of a new token.")))
        .required("finish_reason", word(&["stop", "length"], "Why the answer ended."))
        .required("usage", reference("Usage"))
        .required("latency_ms", number("Milliseconds from the request to the answer."))
        .required("model_digest", text("sha256 of the weights."))
        .sometimes("revision", text("The revision of the model."))
        .sometimes("stopped_by", stopped_by)
        .sometimes("logprobs", list(logprobs))
        .build()
}

fn usage() -> Value {
    open_object()
        .required("prompt_tokens", count("Tokens of the prompt."))
        .required("completion_tokens", count("Tokens of the answer."))
        .required("total_tokens", count("Both together."))
        .build()
}

fn embeddings_request() -> Value {
    let input = any_of([
        text("A text."),
        described(token_ids(1), "The token ids of one text, special tokens and all."),
        list_of(1, MAX_TEXTS, any_of([text("A text."), token_ids(1)])),
    ]);
    object()
        .required("input", input)
        .optional("model", model_name())
        .optional(
            "encoding_format",
            word(&["float", "base64"], "How vectors are written: base64 of little-endian f32."),
        )
        .optional(
            "dimensions",
            whole(
                1,
                MAX_U32,
                "Values of a vector: as many as the model gives, or fewer of a model trained for it.",
            ),
        )
        .optional(
            "truncate",
            flag("Whether texts that are too long are cut instead of refused; true where it is left out."),
        )
        .optional("priority", priority())
        .optional("user", text("Changes nothing."))
        .build()
}

fn embeddings() -> Value {
    let vector = any_of([list(number("A value.")), text("base64 of little-endian f32.")]);
    let item = open_object()
        .required("object", constant("embedding"))
        .required("index", count("The place of the text in the request."))
        .required("embedding", vector)
        .build();
    let usage = open_object()
        .required("prompt_tokens", count("Tokens of all texts."))
        .required("total_tokens", count("The same."))
        .build();
    open_object()
        .required("object", constant("list"))
        .required("data", list(item))
        .required("model", text("The model that answered."))
        .required("usage", usage)
        .required("id", text("The id of the answer."))
        .required("model_digest", text("sha256 of the model's files."))
        .sometimes("revision", text("The revision of the model."))
        .required("latency_ms", number("Milliseconds from the request to the answer."))
        .required(
            "pooling",
            word(&["mean", "first", "max", "last"], "How the tokens of a text become one vector."),
        )
        .sometimes("pooling_note", text("Where the model's files do not say how to pool."))
        .sometimes("truncated", list(count("The place of a text that was cut.")))
        .build()
}

fn model() -> Value {
    let states = ["unknown", "pending", "loading", "warming", "ready", "draining", "unloaded", "failed"];
    open_object()
        .required("id", text("The model's name."))
        .required("object", constant("model"))
        .required("created", count("Seconds since 1970 at which the model entered its state."))
        .required("owned_by", text("Always trustformers."))
        .required("task", text("What the model does, a word of the tasks; empty until it is known."))
        .required("state", word(&states, "The state of the model."))
        .required("reason", text("Why it failed, in one word."))
        .required("message", text("What is wrong and what to do."))
        .required("revision", text("The revision of the model."))
        .required("digest", text("sha256 of the weights, once it is known."))
        .required("device", text("Where it runs."))
        .required("context_tokens", count("Tokens of prompt and answer together."))
        .required("embedding_dimensions", nullable(whole(1, MAX_U32, "Values of a vector.")))
        .required("loaded_bytes", count("Bytes that are loaded."))
        .required("total_bytes", count("Bytes to load."))
        .required("slots", list(slot(&states)))
        .sometimes("parent", text("The model that this adapter belongs to."))
        .sometimes("aliases", list(text("Another name of the adapter.")))
        .build()
}

/// A version of a model.
fn slot(states: &[&str]) -> Value {
    let roles = ["current", "candidate", "previous", "rolled_back"];
    let role = word(&roles, "The current version answers requests that name no revision.");
    open_object()
        .required("role", role)
        .required("state", word(states, "The state of the version."))
        .required("revision", text("The revision."))
        .required("digest", text("sha256 of the weights, once it is known."))
        .required("reason", text("Why it failed, in one word."))
        .required("message", text("What is wrong and what to do."))
        .required("loaded_bytes", count("Bytes that are loaded."))
        .required("total_bytes", count("Bytes to load."))
        .required("bytes_per_second", count("How fast it loads."))
        .required("eta_ms", nullable(count("Estimated milliseconds until its bytes are loaded.")))
        .required("memory_bytes", count("Bytes that it takes on its device."))
        .build()
}

fn digest(what: &str) -> Value {
    described(sha256(), what)
}

fn unload_request() -> Value {
    object()
        .required("model", text("The name of the model to unload."))
        .optional("digest", digest("Only the version of this digest."))
        .optional("revision", text("Only the version of this revision."))
        .build()
}

fn swap_request() -> Value {
    object()
        .required("model", text("The name of the model."))
        .optional("digest", digest("The digest of the version that is to answer."))
        .optional("revision", text("The revision of the version that is to answer."))
        .optional("from", text("The name of another model, which becomes the version that answers."))
        .optional("expected_digest", digest("The digest that must answer now; otherwise nothing is changed."))
        .build()
}

fn rollback_request() -> Value {
    object()
        .required("model", text("The name of the model."))
        .optional("expected_digest", digest("The digest that must answer now; otherwise nothing is changed."))
        .build()
}

fn golden_probe() -> Value {
    object()
        .required("prompt", text("The prompt."))
        .optional("max_tokens", whole(1, 256, "Tokens of the answer; by default 16."))
        .optional("text", text("The text of the answer."))
        .optional("begins_with", described(text_within(1, 256), "How the answer begins."))
        .optional(
            "tokens_sha256",
            digest("sha256 of the ids of the answer's tokens in decimal with one space between two."),
        )
        .build()
}

fn adapter() -> Value {
    object()
        .required("name", described(text_within(1, 128), "The name that callers use."))
        .required("path", described(text_within(1, 4096), "A folder with the adapter as PEFT writes it."))
        .optional("sha256", digest("The digest that its files must have."))
        .build()
}

fn load_request() -> Value {
    let name = described(text_within(1, 256), "The name that callers will use.");
    let tasks: Vec<&str> = Task::ALL.iter().map(|task| task.as_str()).collect();
    object()
        .required("name", name)
        .required(
            "path",
            described(text_within(1, 4096), "A file or folder of the server's machine, or a file:// URI."),
        )
        .optional("files", list(text("A pattern that picks the model's files in the folder.")))
        .optional("sha256", described(sha256(), "The digest that the files must have."))
        .optional("task", word(&tasks, "The task that the files must serve."))
        .optional("device", text("Where it runs: auto or cpu."))
        .optional("numerics", word(&["fast", "exact"], "Whether activations may be quantised."))
        .optional("context_tokens", whole(1, MAX_U32, "Longest prompt and answer together."))
        .optional("max_batch_size", whole(1, MAX_U32, "Sequences or texts that are computed together."))
        .optional(
            "revision",
            text("The name of this version; with one, it may be loaded beside another version of the model."),
        )
        .optional("kv_cache", word(&["auto", "f32", "f16", "bf16"], "The type of cached keys and values."))
        .optional("max_queue", whole(1, MAX_U32, "Requests that may wait."))
        .optional(
            "batch_strategy",
            word(&["time", "size", "dynamic", "priority"], "When waiting texts become a step."),
        )
        .optional("max_wait_ms", whole(1, 1000, "Longest time that a free device waits for more texts."))
        .optional("priority", flag("Whether the priority class of a request decides its order."))
        .optional("probe", described(golden_probe(), "What the model must answer before it may serve."))
        .optional("probes", list(golden_probe()))
        .optional("adapters", list_of(0, 32, adapter()))
        .build()
}

fn health() -> Value {
    open_object()
        .required("status", word(&["ok", "unavailable"], "Yes or no."))
        .required("message", text("The state or the cause."))
        .build()
}
