//! Where a model's files come from.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Quantity;

/// Where the model's files come from, and which of them are used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [
    {
        "rule": "!has(self.revision) || self.uri.startsWith('hf://')",
        "message": "spec.source.revision: only hf:// has branches, tags and commits; remove it"
    },
    {
        "rule": "!has(self.oci) || self.uri.startsWith('oci://')",
        "message": "spec.source.oci: it says how oci:// is read; remove it"
    },
    {
        "rule": "!(has(self.secretRef) || has(self.cache)) || !(self.uri.startsWith('pvc://') || self.uri.startsWith('oci://') && (!has(self.oci) || self.oci != 'Pull'))",
        "message": "spec.source: secretRef and cache are for files that the pod fetches; for oci:// set oci: Pull, else remove them"
    }
]))]
pub struct Source {
    /// `oci://IMAGE` mounts an OCI image or artifact (kubelet pulls and caches it), or is pulled by the pod;
    /// `pvc://CLAIM[/PATH]` mounts a PersistentVolumeClaim of this namespace, read-only. The pod itself
    /// fetches
    /// `hf://ORG/NAME[/FILE]`, `s3://BUCKET/KEY`, `gs://BUCKET/KEY`, `az://CONTAINER/KEY` and
    /// `https://HOST/FILE`.
    #[schemars(
        length(min = 7, max = 512),
        extend("x-kubernetes-validations" = [
            {
                "rule": "self.matches('^(oci|pvc|hf|s3|gs|az|https)://')",
                "message": "spec.source.uri: this scheme is not supported; use oci://IMAGE, pvc://CLAIM[/PATH], hf://ORG/NAME, s3://BUCKET/KEY, gs://BUCKET/KEY, az://CONTAINER/KEY or https://HOST/FILE"
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
                "rule": "!self.startsWith('hf://') || self.matches('^hf://[^/@]+/[^/@]+(/[^@]+)?$')",
                "message": "spec.source.uri: after hf:// come the owner and the name of a repository: hf://ORG/NAME; a branch, tag or commit is spec.source.revision"
            },
            {
                "rule": "!self.startsWith('https://') || self.matches('^https://[^/@]+/.+$')",
                "message": "spec.source.uri: after https:// come a host and the path of a file, without a user: credentials belong into spec.source.secretRef"
            },
            {
                "rule": "!self.contains('..') && !self.matches('[\\\\s]')",
                "message": "spec.source.uri: '..' and white space are not allowed"
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

    /// Branch, tag or commit of a repository (`hf://`). Default: `main`. A branch is looked up each time a
    /// pod starts; a commit stays what it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256))]
    pub revision: Option<String>,

    /// How `oci://` is read. Default: `ImageVolume`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oci: Option<OciAccess>,

    /// Secret of this namespace with the credentials to fetch the files: each key is a variable by its usual
    /// name, such as `HF_TOKEN`, `AWS_ACCESS_KEY_ID` or `.dockerconfigjson`. It is mounted by the pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<SecretRef>,

    /// Where fetched files are kept. Default: an emptyDir, so that each pod fetches its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<SourceCache>,
}

/// Where an adapter's files come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [
    {
        "rule": "!has(self.revision) || self.uri.startsWith('hf://')",
        "message": "spec.runtime.adapters: only hf:// has branches, tags and commits; remove source.revision"
    }
]))]
pub struct AdapterSource {
    /// `oci://IMAGE` mounts an OCI image or artifact, `pvc://CLAIM[/PATH]` a PersistentVolumeClaim of this
    /// namespace, read-only. The pod itself fetches `hf://ORG/NAME`, `s3://BUCKET/KEY`, `gs://BUCKET/KEY` and
    /// `az://CONTAINER/KEY`, into the cache and with the credentials of `spec.source` where that is fetched
    /// too, else without credentials.
    #[schemars(
        length(min = 7, max = 512),
        extend("x-kubernetes-validations" = [
            {
                "rule": "self.matches('^(oci://[a-zA-Z0-9][a-zA-Z0-9._/:@-]*|pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?(/[^/:]+)*/?|hf://[^/@]+/[^/@]+|(s3|gs|az)://.+)$')",
                "message": "spec.runtime.adapters: source.uri is none of oci://IMAGE, pvc://CLAIM[/PATH], hf://ORG/NAME, s3://BUCKET/KEY, gs://BUCKET/KEY and az://CONTAINER/KEY"
            },
            {
                "rule": "!self.contains('..') && !self.matches('[\\\\s]')",
                "message": "spec.runtime.adapters: '..' and white space are not allowed in source.uri"
            }
        ])
    )]
    pub uri: String,

    /// Branch, tag or commit of a repository (`hf://`). Default: `main`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256))]
    pub revision: Option<String>,

    /// Expected sha256 of the sorted lines `<sha256>  <path>` of its two files, 64 lower-case hex digits. A
    /// pod refuses to load files with another digest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64), regex(pattern = r"^[0-9a-f]{64}$"))]
    pub sha256: Option<String>,
}

/// How an OCI image or artifact is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum OciAccess {
    /// Kubelet pulls it and mounts it. The runtime of the node's containers must support image volumes.
    #[default]
    ImageVolume,
    /// The pod pulls it, with the credentials of `secretRef`, into its cache.
    Pull,
}

/// A Secret of the model's namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SecretRef {
    /// The Secret's name.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// A volume for fetched files.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [
    {
        "rule": "has(self.emptyDir) != has(self.pvc)",
        "message": "spec.source.cache: give one of emptyDir and pvc"
    }
]))]
pub struct SourceCache {
    /// A directory that lives as long as its pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub empty_dir: Option<EmptyDirCache>,

    /// A claim that pods share: each file is fetched once. Its volume must allow writing by all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pvc: Option<ClaimCache>,
}

/// A directory that lives as long as its pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EmptyDirCache {
    /// Kubelet evicts a pod whose directory is larger. Default: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_limit: Option<Quantity>,
}

/// A claim of the model's namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ClaimCache {
    /// The claim's name.
    #[schemars(length(min = 1, max = 253))]
    pub claim_name: String,
}
