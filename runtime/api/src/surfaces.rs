//! The routes and methods that ask a model, each with the task of the models that can answer it.
//!
//! Servers, gateways and errors read this one table: a new route is one more line.

use trustformers_proto::Task;

/// The gRPC service of these methods, as it stands in front of a method's name in a path.
pub const INFERENCE_SERVICE: &str = "/trustformers.v1.InferenceService/";

/// One route over HTTP and the gRPC method that does the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Surface {
    /// The task of the models that can answer.
    pub task: Task,
    /// The path over HTTP; its method is POST.
    pub http_path: &'static str,
    /// The method of [`INFERENCE_SERVICE`].
    pub grpc_method: &'static str,
}

/// Every surface. The first one of a task is the one that errors recommend.
pub const SURFACES: &[Surface] = &[
    Surface { task: Task::Generate, http_path: "/v1/generate", grpc_method: "Generate" },
    Surface { task: Task::Generate, http_path: "/v1/generate/stream", grpc_method: "GenerateStream" },
    Surface { task: Task::Embed, http_path: "/v1/embeddings", grpc_method: "Embed" },
];

/// The task that a path asks for, over HTTP or gRPC. None for every other path.
#[must_use]
pub fn task_of_path(path: &str) -> Option<Task> {
    let found = match path.strip_prefix(INFERENCE_SERVICE) {
        Some(method) => SURFACES.iter().find(|surface| surface.grpc_method == method),
        None => SURFACES.iter().find(|surface| surface.http_path == path),
    };
    found.map(|surface| surface.task)
}

/// The routes over HTTP in a row, as a clause of an error.
pub(crate) fn list_http() -> String {
    let routes: Vec<String> = SURFACES.iter().map(|surface| format!("POST {}", surface.http_path)).collect();
    routes.join(", ")
}

/// How to ask a model of this task, as a clause of an error.
pub(crate) fn how_to_ask(task: Task) -> String {
    match SURFACES.iter().find(|surface| surface.task == task) {
        Some(Surface { http_path, grpc_method, .. }) => format!("POST {http_path} (gRPC: {grpc_method})"),
        None => "GET /v1/models".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_has_a_surface() {
        for &task in Task::ALL {
            assert!(SURFACES.iter().any(|surface| surface.task == task), "{task}");
        }
    }

    #[test]
    fn paths_of_both_protocols_give_their_task() {
        assert_eq!(task_of_path("/v1/generate/stream"), Some(Task::Generate));
        assert_eq!(task_of_path("/trustformers.v1.InferenceService/Embed"), Some(Task::Embed));
        assert_eq!(task_of_path("/Embed"), None);
        assert_eq!(task_of_path("/v1/unknown"), None);
    }
}
