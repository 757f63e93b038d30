//! The one table of all routes and methods.
//!
//! Routes, the gateway's forwarding, the shape of errors, metrics and the OpenAPI document follow from it: a
//! new surface is one more row. Tests compare it with the routes that are served.

use std::collections::HashMap;
use std::str::Split;

use trustformers_proto::Task;

use crate::error::ErrorShape;

/// The gRPC service of the methods that ask a model, as it stands in front of a method's name in a path.
pub const INFERENCE_SERVICE: &str = "/trustformers.v1.InferenceService/";

/// One route, or one gRPC method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Surface {
    /// Its name in metrics and in the OpenAPI document. An alias has the name of its original.
    pub name: &'static str,
    /// Where it is called.
    pub endpoint: Endpoint,
    /// The task of the models that can answer. None: no model is asked, or a model of any task.
    pub task: Option<Task>,
    /// Where a request names the model.
    pub model: ModelPlace,
    /// How requests and answers go.
    pub kind: Kind,
    /// The protocol whose words its errors are written in.
    pub errors: ErrorShape,
    /// Whether sending a request again, after an attempt that gave no byte of an answer, does no harm.
    pub idempotent: bool,
    /// Whether the answer depends on the request and the model alone, so that it may be given again.
    pub cacheable: bool,
}

/// Where a surface is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Endpoint {
    /// Over HTTP.
    Http {
        /// The method.
        method: HttpMethod,
        /// The path; `{name}` stands for one segment, and `{model}` for one or more, since names of models
        /// have slashes.
        path: &'static str,
    },
    /// Over gRPC.
    Grpc {
        /// The full name of the service.
        service: &'static str,
        /// The name of the method.
        method: &'static str,
    },
}

/// The method of an HTTP route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HttpMethod {
    /// `GET`, and `HEAD` with it.
    Get,
    /// `POST`.
    Post,
}

impl HttpMethod {
    /// The word on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Post => "POST",
        }
    }

    fn is(self, method: &str) -> bool {
        self.as_str() == method || (self == Self::Get && method == "HEAD")
    }
}

/// Where a request names the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelPlace {
    /// In the field `model` of its JSON body.
    JsonField,
    /// In the field of this number of its message.
    ProtoField(u32),
    /// In the segments `{model}` of its path.
    PathSegment,
    /// In each of the messages that follow on the connection; the first one decides where it goes.
    FirstMessage {
        /// The numbers of the fields that lead to it in a message of gRPC. Empty where messages are JSON,
        /// which have it in the field `model`.
        fields: &'static [u32],
    },
    /// Nowhere: it is about no model, or about all.
    Nowhere,
}

/// How requests and answers go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// One request, one answer.
    Unary,
    /// One request, a stream of answers.
    ServerStream,
    /// A stream where the body says `"stream": true`, else one answer.
    BodyDecides,
    /// Streams both ways.
    Bidirectional,
    /// The connection changes to another protocol.
    Upgrade,
}

const INFERENCE: &str = "trustformers.v1.InferenceService";
const MODELS: &str = "trustformers.v1.ModelService";
const HEALTH: &str = "trustformers.v1.HealthService";
const KSERVE: &str = "inference.GRPCInferenceService";

const JSON: ModelPlace = ModelPlace::JsonField;
const IN_PATH: ModelPlace = ModelPlace::PathSegment;
/// In the messages of a WebSocket.
const FIRST_JSON: ModelPlace = ModelPlace::FirstMessage { fields: &[] };
/// In field 5 of the request that a message of a session starts.
const FIRST_OF_SESSION: ModelPlace = ModelPlace::FirstMessage { fields: &[2, 5] };
/// In field 1 of the messages of KServe's stream.
const FIRST_OF_KSERVE: ModelPlace = ModelPlace::FirstMessage { fields: &[1] };
/// Every request of this package has the model's name in its field 5.
const FIELD_5: ModelPlace = ModelPlace::ProtoField(5);
/// Every request of KServe's package that names a model has it in its field 1.
const FIELD_1: ModelPlace = ModelPlace::ProtoField(1);

const fn row(name: &'static str, endpoint: Endpoint, errors: ErrorShape) -> Surface {
    Surface {
        name,
        endpoint,
        task: None,
        model: ModelPlace::Nowhere,
        kind: Kind::Unary,
        errors,
        idempotent: true,
        cacheable: false,
    }
}

const fn get(name: &'static str, path: &'static str) -> Surface {
    row(name, Endpoint::Http { method: HttpMethod::Get, path }, ErrorShape::Native)
}

const fn post(name: &'static str, path: &'static str) -> Surface {
    row(name, Endpoint::Http { method: HttpMethod::Post, path }, ErrorShape::Native)
}

const fn grpc(name: &'static str, service: &'static str, method: &'static str) -> Surface {
    row(name, Endpoint::Grpc { service, method }, ErrorShape::Grpc)
}

impl Surface {
    /// It asks a model of this task, which is named there.
    const fn asks(self, task: Task, model: ModelPlace) -> Self {
        Self { task: Some(task), model, ..self }
    }

    /// A model of any task is named there.
    const fn names(self, model: ModelPlace) -> Self {
        Self { model, ..self }
    }

    const fn kind(self, kind: Kind) -> Self {
        Self { kind, ..self }
    }

    const fn errors(self, errors: ErrorShape) -> Self {
        Self { errors, ..self }
    }

    const fn not_idempotent(self) -> Self {
        Self { idempotent: false, ..self }
    }

    const fn cacheable(self) -> Self {
        Self { cacheable: true, ..self }
    }

    /// Whether it is another path of a surface that stands in the table before it.
    #[must_use]
    pub fn is_alias(&self) -> bool {
        self.http_path().is_some_and(|path| path.starts_with("/openai/") || path.contains("/{version}"))
    }

    /// The model that a path of this row names, as it is written there: percent-encoded. None where the row
    /// has no model in its path.
    #[must_use]
    pub fn model_in_path<'a>(&self, path: &'a str) -> Option<&'a str> {
        let (before, behind) = self.http_path()?.split_once("{model}")?;
        let rest = path.get(before.len()..)?;
        // Every segment behind the name stands for one segment of the path.
        let mut end = rest.len();
        for _ in 0..behind.matches('/').count() {
            end = rest[..end].rfind('/')?;
        }
        Some(&rest[..end])
    }

    /// Its path, where it is called over HTTP.
    #[must_use]
    pub const fn http_path(&self) -> Option<&'static str> {
        match self.endpoint {
            Endpoint::Http { path, .. } => Some(path),
            Endpoint::Grpc { .. } => None,
        }
    }
}

const GENERATE: Task = Task::Generate;
const EMBED: Task = Task::Embed;
const CLASSIFY: Task = Task::Classify;
const RERANK: Task = Task::Rerank;
const OPENAI: ErrorShape = ErrorShape::OpenAi;
const ANTHROPIC: ErrorShape = ErrorShape::Anthropic;
const KSERVE_HTTP: ErrorShape = ErrorShape::KserveHttp;

/// A route of OpenAI's that generates.
const fn openai(name: &'static str, path: &'static str) -> Surface {
    post(name, path).asks(GENERATE, JSON).kind(Kind::BodyDecides).errors(OPENAI)
}

/// A route of KServe's about the server.
const fn kserve(name: &'static str, path: &'static str) -> Surface {
    get(name, path).errors(KSERVE_HTTP)
}

/// A route of KServe's that a model answers.
const fn kserve_post(name: &'static str, path: &'static str) -> Surface {
    post(name, path).names(IN_PATH).errors(KSERVE_HTTP)
}

/// Every surface. The first one of a task, over HTTP and over gRPC, is the one that errors recommend.
pub const SURFACES: &[Surface] = &[
    post("generate", "/v1/generate").asks(GENERATE, JSON).kind(Kind::BodyDecides),
    post("generate_stream", "/v1/generate/stream").asks(GENERATE, JSON).kind(Kind::ServerStream),
    post("embeddings", "/v1/embeddings").asks(EMBED, JSON).errors(OPENAI).cacheable(),
    post("classify", "/v1/classify").asks(CLASSIFY, JSON).cacheable(),
    post("rerank", "/v1/rerank").asks(RERANK, JSON).cacheable(),
    get("list_models", "/v1/models").errors(OPENAI),
    get("get_model", "/v1/models/{model}").names(IN_PATH).errors(OPENAI),
    post("load_model", "/v1/models/load").names(JSON).not_idempotent(),
    post("unload_model", "/v1/models/unload").names(JSON).not_idempotent(),
    post("swap_model", "/v1/models/swap").names(JSON).not_idempotent(),
    post("rollback_model", "/v1/models/rollback").names(JSON).not_idempotent(),
    get("stream", "/v1/stream").asks(GENERATE, FIRST_JSON).kind(Kind::Upgrade).not_idempotent(),
    get("openapi", "/openapi.json"),
    get("health", "/health"),
    get("health_ready", "/health/ready"),
    get("health_live", "/health/live"),
    get("health_startup", "/health/startup"),
    // OpenAI.
    openai("chat_completions", "/v1/chat/completions"),
    openai("completions", "/v1/completions"),
    openai("responses", "/v1/responses"),
    openai("chat_completions", "/openai/v1/chat/completions"),
    openai("completions", "/openai/v1/completions"),
    openai("responses", "/openai/v1/responses"),
    post("embeddings", "/openai/v1/embeddings").asks(EMBED, JSON).errors(OPENAI).cacheable(),
    get("list_models", "/openai/v1/models").errors(OPENAI),
    get("get_model", "/openai/v1/models/{model}").names(IN_PATH).errors(OPENAI),
    // Anthropic.
    post("messages", "/v1/messages").asks(GENERATE, JSON).kind(Kind::BodyDecides).errors(ANTHROPIC),
    post("count_tokens", "/v1/messages/count_tokens").asks(GENERATE, JSON).errors(ANTHROPIC).cacheable(),
    // KServe v2.
    kserve("kserve_server", "/v2"),
    kserve("kserve_live", "/v2/health/live"),
    kserve("kserve_ready", "/v2/health/ready"),
    kserve("kserve_model", "/v2/models/{model}").names(IN_PATH),
    kserve("kserve_model_ready", "/v2/models/{model}/ready").names(IN_PATH),
    kserve("kserve_config", "/v2/models/{model}/config").names(IN_PATH),
    kserve("kserve_statistics", "/v2/models/{model}/stats").names(IN_PATH),
    kserve("kserve_all_statistics", "/v2/models/stats"),
    kserve_post("kserve_infer", "/v2/models/{model}/infer"),
    kserve_post("kserve_generate", "/v2/models/{model}/generate").asks(GENERATE, IN_PATH),
    kserve_post("kserve_generate_stream", "/v2/models/{model}/generate_stream")
        .asks(GENERATE, IN_PATH)
        .kind(Kind::ServerStream),
    kserve("kserve_model", "/v2/models/{model}/versions/{version}").names(IN_PATH),
    kserve("kserve_model_ready", "/v2/models/{model}/versions/{version}/ready").names(IN_PATH),
    kserve("kserve_config", "/v2/models/{model}/versions/{version}/config").names(IN_PATH),
    kserve("kserve_statistics", "/v2/models/{model}/versions/{version}/stats").names(IN_PATH),
    kserve_post("kserve_infer", "/v2/models/{model}/versions/{version}/infer"),
    kserve_post("kserve_generate", "/v2/models/{model}/versions/{version}/generate").asks(GENERATE, IN_PATH),
    kserve_post("kserve_generate_stream", "/v2/models/{model}/versions/{version}/generate_stream")
        .asks(GENERATE, IN_PATH)
        .kind(Kind::ServerStream),
    post("kserve_index", "/v2/repository/index").errors(KSERVE_HTTP),
    // gRPC: trustformers.v1.
    grpc("grpc_generate", INFERENCE, "Generate").asks(GENERATE, FIELD_5),
    grpc("grpc_generate_stream", INFERENCE, "GenerateStream")
        .asks(GENERATE, FIELD_5)
        .kind(Kind::ServerStream),
    grpc("grpc_session", INFERENCE, "Session")
        .asks(GENERATE, FIRST_OF_SESSION)
        .kind(Kind::Bidirectional)
        .not_idempotent(),
    grpc("grpc_embed", INFERENCE, "Embed").asks(EMBED, FIELD_5).cacheable(),
    grpc("grpc_classify", INFERENCE, "Classify").asks(CLASSIFY, FIELD_5).cacheable(),
    grpc("grpc_rerank", INFERENCE, "Rerank").asks(RERANK, FIELD_5).cacheable(),
    grpc("grpc_list_models", MODELS, "ListModels"),
    grpc("grpc_watch_models", MODELS, "WatchModels").kind(Kind::ServerStream),
    grpc("grpc_load_model", MODELS, "LoadModel").names(FIELD_5).not_idempotent(),
    grpc("grpc_unload_model", MODELS, "UnloadModel").names(FIELD_5).not_idempotent(),
    grpc("grpc_swap_model", MODELS, "SwapModel").names(FIELD_5).not_idempotent(),
    grpc("grpc_rollback_model", MODELS, "RollbackModel").names(FIELD_5).not_idempotent(),
    grpc("grpc_health", HEALTH, "Check"),
    // gRPC: KServe v2.
    grpc("kserve_grpc_live", KSERVE, "ServerLive"),
    grpc("kserve_grpc_ready", KSERVE, "ServerReady"),
    grpc("kserve_grpc_server", KSERVE, "ServerMetadata"),
    grpc("kserve_grpc_model_ready", KSERVE, "ModelReady").names(FIELD_1),
    grpc("kserve_grpc_model", KSERVE, "ModelMetadata").names(FIELD_1),
    grpc("kserve_grpc_infer", KSERVE, "ModelInfer").names(FIELD_1),
    grpc("kserve_grpc_stream_infer", KSERVE, "ModelStreamInfer")
        .names(FIRST_OF_KSERVE)
        .kind(Kind::Bidirectional)
        .not_idempotent(),
    grpc("kserve_grpc_config", KSERVE, "ModelConfig").names(FIELD_1),
    grpc("kserve_grpc_statistics", KSERVE, "ModelStatistics").names(FIELD_1),
    grpc("kserve_grpc_index", KSERVE, "RepositoryIndex"),
    // gRPC: what every server of it has.
    grpc("grpc_health_check", "grpc.health.v1.Health", "Check"),
    grpc("grpc_health_watch", "grpc.health.v1.Health", "Watch").kind(Kind::ServerStream),
    grpc("grpc_reflection", "grpc.reflection.v1.ServerReflection", "ServerReflectionInfo")
        .kind(Kind::Bidirectional),
    grpc("grpc_reflection", "grpc.reflection.v1alpha.ServerReflection", "ServerReflectionInfo")
        .kind(Kind::Bidirectional),
];

/// How many segments of a path are the same in a template that it fits; the others are placeholders. None
/// where it does not fit.
fn literal_segments(mut template: Split<'_, char>, path: &[&str]) -> Option<usize> {
    let Some(segment) = template.next() else { return path.is_empty().then_some(0) };
    let (found, others) = path.split_first()?;
    if segment == "{model}" {
        // A name has one segment or more. There is one name in a template, so this is linear.
        let rests = (0..path.len()).map(|last| &path[last + 1..]);
        return rests.filter_map(|rest| literal_segments(template.clone(), rest)).max();
    }
    if segment == *found {
        return literal_segments(template, others).map(|literal| literal + 1);
    }
    if segment.starts_with('{') { literal_segments(template, others) } else { None }
}

/// The row of a path over HTTP whose method is wanted; the most particular one where several fit.
fn http_row(path: &str, wanted: impl Fn(HttpMethod) -> bool) -> Option<&'static Surface> {
    let path: Vec<&str> = path.split('/').collect();
    let fitting = SURFACES.iter().filter_map(|surface| match surface.endpoint {
        Endpoint::Http { method, path: template } if wanted(method) => {
            literal_segments(template.split('/'), &path).map(|literal| (literal, surface))
        }
        _ => None,
    });
    fitting.max_by_key(|(literal, _)| *literal).map(|(_, surface)| surface)
}

/// The rows whose path is a literal, by path: for a server that looks at every request before it passes it
/// on. A literal is the most particular row of its path, so that most requests need no search.
#[derive(Debug, Clone)]
pub struct LiteralRows(HashMap<&'static str, Vec<&'static Surface>>);

impl Default for LiteralRows {
    fn default() -> Self {
        let mut rows: HashMap<&str, Vec<&Surface>> = HashMap::new();
        for surface in SURFACES {
            if let Some(path) = surface.http_path().filter(|path| !path.contains('{')) {
                rows.entry(path).or_default().push(surface);
            }
        }
        Self(rows)
    }
}

impl LiteralRows {
    /// The same as [`http_surface`], sooner.
    #[must_use]
    pub fn http_surface(&self, method: &str, path: &str) -> Option<&'static Surface> {
        let is_called = |surface: &Surface| match surface.endpoint {
            Endpoint::Http { method: of_row, .. } => of_row.is(method),
            Endpoint::Grpc { .. } => false,
        };
        let literal = self.0.get(path).and_then(|rows| rows.iter().copied().find(|row| is_called(row)));
        literal.or_else(|| http_surface(method, path))
    }
}

/// The row of a request over HTTP. The method is that of the request line, such as `POST`.
#[must_use]
pub fn http_surface(method: &str, path: &str) -> Option<&'static Surface> {
    http_row(path, |of_row| of_row.is(method))
}

/// The method that a path over HTTP takes, whatever it was asked with. None where there is no such path.
#[must_use]
pub fn method_of_path(path: &str) -> Option<HttpMethod> {
    match http_row(path, |_| true)?.endpoint {
        Endpoint::Http { method, .. } => Some(method),
        Endpoint::Grpc { .. } => None,
    }
}

/// The row of a path over gRPC, such as `/trustformers.v1.InferenceService/Embed`.
#[must_use]
pub fn grpc_surface(path: &str) -> Option<&'static Surface> {
    let (service, method) = path.strip_prefix('/')?.split_once('/')?;
    SURFACES.iter().find(|surface| match surface.endpoint {
        Endpoint::Grpc { service: of_row, method: called } => of_row == service && called == method,
        Endpoint::Http { .. } => false,
    })
}

/// The protocol whose words the errors of a path over HTTP are written in, whatever the method and whether
/// there is such a route.
#[must_use]
pub fn error_shape(path: &str) -> ErrorShape {
    if let Some(surface) = http_row(path, |_| true) {
        return surface.errors;
    }
    let prefixes = [
        ("/v2/", KSERVE_HTTP),
        ("/openai/", OPENAI),
        ("/v1/chat/", OPENAI),
        ("/v1/responses/", OPENAI),
        ("/v1/messages/", ANTHROPIC),
    ];
    let found = prefixes.iter().find(|(prefix, _)| path.starts_with(prefix));
    found.map_or(ErrorShape::Native, |(_, shape)| *shape)
}

/// The task that a path asks for, over HTTP or gRPC. None for every other path.
#[must_use]
pub fn task_of_path(path: &str) -> Option<Task> {
    grpc_surface(path).or_else(|| http_row(path, |_| true))?.task
}

/// The routes over HTTP that ask a model, as a clause of an error.
pub(crate) fn list_http() -> String {
    let asks = SURFACES.iter().filter(|surface| surface.task.is_some() && !surface.is_alias());
    let routes: Vec<String> = asks
        .filter_map(|surface| match surface.endpoint {
            Endpoint::Http { method: HttpMethod::Post, path } if path.starts_with("/v1/") => {
                Some(format!("POST {path}"))
            }
            _ => None,
        })
        .collect();
    routes.join(", ")
}

/// How to ask a model of this task, as a clause of an error.
pub(crate) fn how_to_ask(task: Task) -> String {
    let mut asks =
        SURFACES.iter().filter(|surface| surface.task == Some(task)).map(|surface| surface.endpoint);
    let http = asks.clone().find_map(|endpoint| match endpoint {
        Endpoint::Http { method, path } => Some(format!("{} {path}", method.as_str())),
        Endpoint::Grpc { .. } => None,
    });
    let grpc = asks.find_map(|endpoint| match endpoint {
        Endpoint::Grpc { method, .. } => Some(method),
        Endpoint::Http { .. } => None,
    });
    match (http, grpc) {
        (Some(http), Some(grpc)) => format!("{http} (gRPC: {grpc})"),
        _ => "GET /v1/models".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn every_task_has_a_surface_in_both_protocols() {
        assert_eq!(how_to_ask(Task::Generate), "POST /v1/generate (gRPC: Generate)");
        assert_eq!(how_to_ask(Task::Embed), "POST /v1/embeddings (gRPC: Embed)");
        for &task in Task::ALL {
            assert!(how_to_ask(task).contains("gRPC"), "{task}");
        }
    }

    #[test]
    fn paths_of_both_protocols_give_their_task() {
        assert_eq!(task_of_path("/v1/generate/stream"), Some(Task::Generate));
        assert_eq!(task_of_path("/v1/chat/completions"), Some(Task::Generate));
        assert_eq!(task_of_path("/trustformers.v1.InferenceService/Embed"), Some(Task::Embed));
        assert_eq!(task_of_path("/v1/models"), None);
        assert_eq!(task_of_path("/Embed"), None);
        assert_eq!(task_of_path("/v1/unknown"), None);
    }

    #[test]
    fn names_of_models_may_have_slashes_and_the_most_particular_row_is_found() {
        let name = |method, path| http_surface(method, path).map(|surface| surface.name);
        for (method, path, found) in [
            ("GET", "/v1/models/a", Some("get_model")),
            ("HEAD", "/v1/models/ns/a", Some("get_model")),
            ("POST", "/v1/models/load", Some("load_model")),
            ("GET", "/v1/models/", Some("get_model")),
            ("POST", "/v1/models/a", None),
            ("GET", "/v2/models/ns/a/ready", Some("kserve_model_ready")),
            ("POST", "/v2/models/ns/a/versions/1/infer", Some("kserve_infer")),
            ("POST", "/v2/models/infer", None),
            ("GET", "/v2/models/a%2Fb", Some("kserve_model")),
            ("GET", "/v1/generate", None),
        ] {
            assert_eq!(name(method, path), found, "{method} {path}");
            let literal = LiteralRows::default().http_surface(method, path);
            assert_eq!(literal.map(|surface| surface.name), found, "{method} {path}");
        }
        let versions = http_surface("POST", "/v2/models/a/versions/1/infer").unwrap();
        assert!(versions.is_alias() && versions.http_path().unwrap().contains("{version}"));
    }

    #[test]
    fn the_model_of_a_path_has_every_segment_of_its_name() {
        for (method, path, model) in [
            ("GET", "/v1/models/a", Some("a")),
            ("GET", "/openai/v1/models/ns/a%2Fb", Some("ns/a%2Fb")),
            ("GET", "/v2/models/ns/a/ready", Some("ns/a")),
            ("POST", "/v2/models/ns/a/versions/1/infer", Some("ns/a")),
            ("POST", "/v2/models/versions/versions/infer", Some("versions/versions")),
            ("GET", "/v2/models/stats", None),
            ("POST", "/v1/generate", None),
        ] {
            let surface = http_surface(method, path).unwrap();
            assert_eq!(surface.model_in_path(path), model, "{method} {path}");
        }
        assert_eq!(method_of_path("/v1/generate"), Some(HttpMethod::Post));
        assert_eq!(method_of_path("/v1/nothing"), None);
    }

    #[test]
    fn errors_have_the_shape_of_their_path_on_unknown_routes_too() {
        for (path, shape) in [
            ("/v1/generate", ErrorShape::Native),
            ("/nothing", ErrorShape::Native),
            ("/v1/chat/completions", ErrorShape::OpenAi),
            ("/v1/chat/complete", ErrorShape::OpenAi),
            ("/openai/v1/x", ErrorShape::OpenAi),
            ("/v1/messages", ErrorShape::Anthropic),
            ("/v1/messages/batches", ErrorShape::Anthropic),
            ("/v2/models/a/b/c/infer", ErrorShape::KserveHttp),
            ("/v2/unknown", ErrorShape::KserveHttp),
        ] {
            assert_eq!(error_shape(path), shape, "{path}");
        }
    }

    #[test]
    fn no_two_rows_have_the_same_endpoint_and_only_aliases_share_a_name() {
        let mut endpoints: Vec<String> =
            SURFACES.iter().map(|surface| format!("{:?}", surface.endpoint)).collect();
        endpoints.sort();
        let rows = endpoints.len();
        endpoints.dedup();
        assert_eq!(endpoints.len(), rows);
        let mut originals: BTreeMap<&str, usize> = BTreeMap::new();
        for surface in SURFACES.iter().filter(|surface| !surface.is_alias()) {
            *originals.entry(surface.name).or_default() += 1;
        }
        // Reflection is served in two versions of one protocol.
        originals.remove("grpc_reflection");
        assert!(originals.values().all(|count| *count == 1), "{originals:?}");
        for alias in SURFACES.iter().filter(|surface| surface.is_alias()) {
            assert!(originals.contains_key(alias.name), "{alias:?}");
        }
    }

    #[test]
    fn a_path_of_many_segments_is_matched_in_little_time() {
        let path = format!("/v2/models{}", "/versions/a".repeat(4000));
        let began = std::time::Instant::now();
        assert_eq!(http_surface("GET", &path).unwrap().name, "kserve_model");
        // A search that tries every division anew takes seconds.
        assert!(began.elapsed().as_millis() < 1000, "{:?}", began.elapsed());
    }
}
