//! Where a model's files come from.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Where the model's files come from, and which of them are used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Source {
    /// `oci://IMAGE` mounts an OCI image or artifact (kubelet pulls and caches it); `pvc://CLAIM[/PATH]`
    /// mounts a PersistentVolumeClaim of this namespace, read-only.
    #[schemars(
        length(min = 7, max = 512),
        extend("x-kubernetes-validations" = [
            {
                "rule": "self.startsWith('oci://') || self.startsWith('pvc://')",
                "message": "spec.source.uri: this scheme is not supported; use oci://IMAGE (an OCI image with the model's files) or pvc://CLAIM[/PATH] (a PersistentVolumeClaim in this namespace)"
            },
            {
                "rule": "!self.startsWith('oci://') || self.matches('^oci://[a-zA-Z0-9][a-zA-Z0-9._/:@-]*$')",
                "message": "spec.source.uri: after oci:// comes an image reference such as registry.example/models/smollm2:q4_1"
            },
            {
                "rule": "!self.startsWith('pvc://') || self.matches('^pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?(/[^/:]+)*/?$')",
                "message": "spec.source.uri: after pvc:// comes the name of a claim and, if the model is not at its root, a path below it: pvc://CLAIM[/PATH]"
            },
            {
                "rule": "!self.contains('..')",
                "message": "spec.source.uri: '..' is not allowed"
            }
        ])
    )]
    pub uri: String,

    /// Globs below the source's root that select the model's files, such as `*Q4_1.gguf`. Empty: all files.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 16),
        inner(length(min = 1, max = 256)),
        extend("x-kubernetes-list-type" = "set")
    )]
    pub files: Vec<String>,

    /// Expected sha256 of the file, 64 lower-case hex digits (of several files: sha256 of their sorted lines
    /// `<sha256>  <path>`). A pod refuses to load files with another digest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64), regex(pattern = r"^[0-9a-f]{64}$"))]
    pub sha256: Option<String>,
}
