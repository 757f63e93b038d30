//! The pod template: one container under the restricted Pod Security Standard, with the model mounted
//! read-only.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Capabilities, ConfigMapVolumeSource, Container, ContainerPort, EmptyDirVolumeSource, EnvVar,
    HTTPGetAction, ImageVolumeSource, PersistentVolumeClaimVolumeSource, PodReadinessGate,
    PodSecurityContext, PodSpec, PodTemplateSpec, Probe, ResourceRequirements, SeccompProfile,
    SecretVolumeSource, SecurityContext, Toleration, TopologySpreadConstraint, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use trustformers_crds::{Runtime, TolerationEffect, TolerationOperator};
use trustformers_proto::pod_config::FILE_NAME;

use super::Platform;
use crate::adapters::ValidatedAdapter;
use crate::validate::{CacheVolume, Mount, ValidatedModel};
use crate::{hash, names};

/// Where the model's files are mounted.
pub(super) const MODEL_DIR: &str = "/models";
/// Where fetched files are kept.
pub(super) const CACHE_DIR: &str = "/var/cache/trustformers";
const CACHE_VOLUME: &str = "cache";
/// Where the credentials of the source are mounted.
pub(super) const SECRET_DIR: &str = "/etc/trustformers-source";
const SECRET_VOLUME: &str = "source-credentials";
/// Where `pod.yaml` is mounted.
pub(super) const CONFIG_DIR: &str = "/etc/trustformers";
/// User and group of the process; the images know them as `nonroot`.
const NONROOT: i64 = 65_532;
/// Time after the drain until kubelet kills the process: the last responses are written and files closed.
const END_MARGIN_S: i64 = 10;

pub(super) fn template(
    model: &ValidatedModel,
    platform: &Platform,
    pool: &str,
    config_map: &str,
) -> PodTemplateSpec {
    let mut labels = model.pod.labels.clone();
    labels.extend(names::revision_labels(&model.name, pool));
    let mut annotations = model.pod.annotations.clone();
    annotations.insert(names::POOL_ANNOTATION.to_owned(), hash::pool(model));
    annotations.insert(names::DEFAULT_CONTAINER.to_owned(), names::CONTAINER.to_owned());
    PodTemplateSpec {
        metadata: Some(ObjectMeta {
            labels: Some(labels),
            annotations: Some(annotations),
            ..ObjectMeta::default()
        }),
        spec: Some(pod_spec(model, platform, config_map)),
    }
}

fn pod_spec(model: &ValidatedModel, platform: &Platform, config_map: &str) -> PodSpec {
    let pod = &model.pod;
    let account = pod.service_account_name.clone().unwrap_or_else(|| names::service_account(&model.name));
    // Validation bounds the drain to a week.
    let drain_s = i64::try_from(model.drain_timeout.as_millis().div_ceil(1000)).unwrap_or(i64::MAX / 2);
    PodSpec {
        containers: vec![container(model, platform)],
        volumes: Some(volumes(model, platform, config_map)),
        service_account_name: Some(account),
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        termination_grace_period_seconds: Some(drain_s + END_MARGIN_S),
        readiness_gates: Some(vec![PodReadinessGate { condition_type: names::ROUTABLE_GATE.to_owned() }]),
        security_context: Some(PodSecurityContext {
            run_as_non_root: Some(true),
            run_as_user: Some(NONROOT),
            run_as_group: Some(NONROOT),
            fs_group: Some(NONROOT),
            fs_group_change_policy: Some("OnRootMismatch".to_owned()),
            seccomp_profile: Some(SeccompProfile {
                type_: "RuntimeDefault".to_owned(),
                localhost_profile: None,
            }),
            ..PodSecurityContext::default()
        }),
        node_selector: some(pod.node_selector.clone()),
        affinity: model.affinity.clone(),
        tolerations: some_list(tolerations(model)),
        topology_spread_constraints: some_list(topology_spread(model)),
        priority_class_name: pod.priority_class_name.clone(),
        runtime_class_name: pod.runtime_class_name.clone(),
        ..PodSpec::default()
    }
}

fn container(model: &ValidatedModel, platform: &Platform) -> Container {
    let port = |name: &str, number: u16| ContainerPort {
        name: Some(name.to_owned()),
        container_port: i32::from(number),
        protocol: Some("TCP".to_owned()),
        ..ContainerPort::default()
    };
    let env = model.runtime.env.iter().map(|one| EnvVar {
        name: one.name.clone(),
        value: Some(one.value.clone()),
        value_from: None,
    });
    let mut ports = vec![port("http", names::HTTP_PORT), port("grpc", names::GRPC_PORT)];
    ports.extend(platform.admin.as_ref().map(|_| port("admin", names::ADMIN_PORT)));
    Container {
        name: names::CONTAINER.to_owned(),
        image: Some(model.runtime.image.clone().unwrap_or_else(|| platform.runtime_image.clone())),
        image_pull_policy: Some(platform.pull_policy.clone()),
        args: Some(vec!["--config".to_owned(), format!("{CONFIG_DIR}/{FILE_NAME}")]),
        env: some_list(env.collect()),
        ports: Some(ports),
        resources: resources(&model.runtime),
        volume_mounts: Some(volume_mounts(model)),
        readiness_probe: Some(probe("/health/ready", 1)),
        liveness_probe: Some(probe("/health/live", 10)),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            read_only_root_filesystem: Some(true),
            capabilities: Some(Capabilities { drop: Some(vec!["ALL".to_owned()]), add: None }),
            ..SecurityContext::default()
        }),
        ..Container::default()
    }
}

/// There is no startup probe: it would kill a long load. Liveness responds from the start, and readiness
/// tells when the model serves.
fn probe(path: &str, period_seconds: i32) -> Probe {
    Probe {
        http_get: Some(HTTPGetAction {
            path: Some(path.to_owned()),
            port: IntOrString::String("http".to_owned()),
            ..HTTPGetAction::default()
        }),
        period_seconds: Some(period_seconds),
        timeout_seconds: Some(5),
        failure_threshold: Some(3),
        ..Probe::default()
    }
}

fn config_volume(config_map: &str) -> Volume {
    Volume {
        name: "config".to_owned(),
        config_map: Some(ConfigMapVolumeSource {
            name: config_map.to_owned(),
            ..ConfigMapVolumeSource::default()
        }),
        ..Volume::default()
    }
}

fn volumes(model: &ValidatedModel, platform: &Platform, config_map: &str) -> Vec<Volume> {
    let mut volumes = vec![config_volume(config_map), model_volume(&model.mount, platform)];
    if let Some(secret) = &model.source.secret_ref {
        volumes.push(Volume {
            name: SECRET_VOLUME.to_owned(),
            secret: Some(SecretVolumeSource {
                secret_name: Some(secret.name.clone()),
                ..SecretVolumeSource::default()
            }),
            ..Volume::default()
        });
    }
    volumes.extend(adapter_volumes(model, platform));
    volumes
}

/// The volumes of adapters: one for each that is mounted. Those that are fetched share the model's cache, or
/// have one where the model is mounted.
fn adapter_volumes(model: &ValidatedModel, platform: &Platform) -> impl Iterator<Item = Volume> {
    let own_cache = adapter_cache(model).map(|mount| model_volume(mount, platform));
    let mounted = model.adapters.iter().enumerate().filter(|(_, adapter)| !adapter.is_fetched());
    let volumes = mounted.map(move |(index, adapter)| Volume {
        name: adapter_volume(index),
        ..model_volume(&adapter.mount, platform)
    });
    volumes.chain(own_cache)
}

/// The mount of the cache that only adapters need.
fn adapter_cache(model: &ValidatedModel) -> Option<&Mount> {
    let is_mounted = !matches!(model.mount, Mount::Fetched(_));
    let mut fetched = model.adapters.iter().filter(|adapter| adapter.is_fetched());
    fetched.next().filter(|_| is_mounted).map(|adapter| &adapter.mount)
}

/// A name of an adapter may have characters that a volume's may not.
fn adapter_volume(index: usize) -> String {
    format!("adapter-{index}")
}

fn model_volume(source: &Mount, platform: &Platform) -> Volume {
    let mut volume = Volume { name: "model".to_owned(), ..Volume::default() };
    let claim = |name: &str, is_read_only: bool| PersistentVolumeClaimVolumeSource {
        claim_name: name.to_owned(),
        read_only: is_read_only.then_some(true),
    };
    match source {
        Mount::Image { reference } => {
            volume.image = Some(ImageVolumeSource {
                reference: Some(reference.clone()),
                pull_policy: Some(platform.pull_policy.clone()),
            });
        }
        Mount::Claim { claim: name, .. } => volume.persistent_volume_claim = Some(claim(name, true)),
        Mount::Fetched(cache) => {
            volume.name = CACHE_VOLUME.to_owned();
            match cache {
                CacheVolume::EmptyDir { size_limit } => {
                    volume.empty_dir = Some(EmptyDirVolumeSource {
                        size_limit: size_limit.clone().map(Quantity),
                        medium: None,
                    });
                }
                CacheVolume::Claim(name) => volume.persistent_volume_claim = Some(claim(name, false)),
            }
        }
    }
    volume
}

fn volume_mounts(model: &ValidatedModel) -> Vec<VolumeMount> {
    let mut mounts = vec![mount("config", CONFIG_DIR), model_mount(&model.mount)];
    if model.source.secret_ref.is_some() {
        mounts.push(mount(SECRET_VOLUME, SECRET_DIR));
    }
    let path_of = |(index, adapter): (usize, &ValidatedAdapter)| Some((index, adapter.mount_path()?));
    let paths = model.adapters.iter().enumerate().filter_map(path_of);
    mounts.extend(paths.map(|(index, path)| mount(&adapter_volume(index), &path)));
    mounts.extend(adapter_cache(model).map(model_mount));
    mounts
}

fn model_mount(source: &Mount) -> VolumeMount {
    match source {
        Mount::Claim { .. } | Mount::Image { .. } => mount("model", MODEL_DIR),
        Mount::Fetched(_) => VolumeMount { read_only: None, ..mount(CACHE_VOLUME, CACHE_DIR) },
    }
}

fn mount(name: &str, at: &str) -> VolumeMount {
    VolumeMount {
        name: name.to_owned(),
        mount_path: at.to_owned(),
        read_only: Some(true),
        ..VolumeMount::default()
    }
}

/// Of a device plugin's resource a container requests as many as it is limited to.
fn resources(runtime: &Runtime) -> Option<ResourceRequirements> {
    let gpus = (runtime.gpus > 0).then(|| (runtime.gpu_resource.clone(), Quantity(runtime.gpus.to_string())));
    let amounts = |map: &BTreeMap<String, trustformers_crds::Quantity>| {
        let written = map.iter().map(|(name, amount)| (name.clone(), Quantity(amount.0.clone())));
        some(written.chain(gpus.clone()).collect())
    };
    let desired = &runtime.resources;
    let (limits, requests) = (amounts(&desired.limits), amounts(&desired.requests));
    let any = limits.is_some() || requests.is_some();
    any.then_some(ResourceRequirements { limits, requests, claims: None })
}

/// Those of the spec, and that of nodes which are kept free for pods with GPUs.
fn tolerations(model: &ValidatedModel) -> Vec<Toleration> {
    let mut all: Vec<Toleration> = model.pod.tolerations.iter().map(toleration).collect();
    let of_gpus = Toleration {
        key: Some(model.runtime.gpu_resource.clone()),
        operator: Some("Exists".to_owned()),
        effect: Some("NoSchedule".to_owned()),
        ..Toleration::default()
    };
    if model.runtime.gpus > 0 && !all.contains(&of_gpus) {
        all.push(of_gpus);
    }
    all
}

fn toleration(one: &trustformers_crds::Toleration) -> Toleration {
    Toleration {
        key: one.key.clone(),
        operator: Some(
            match one.operator {
                TolerationOperator::Equal => "Equal",
                TolerationOperator::Exists => "Exists",
            }
            .to_owned(),
        ),
        value: one.value.clone(),
        effect: one.effect.map(|effect| {
            match effect {
                TolerationEffect::NoSchedule => "NoSchedule",
                TolerationEffect::PreferNoSchedule => "PreferNoSchedule",
                TolerationEffect::NoExecute => "NoExecute",
            }
            .to_owned()
        }),
        toleration_seconds: one.toleration_seconds,
    }
}

fn topology_spread(model: &ValidatedModel) -> Vec<TopologySpreadConstraint> {
    let rule = |one: &trustformers_crds::TopologySpread| TopologySpreadConstraint {
        max_skew: one.max_skew,
        topology_key: one.topology_key.clone(),
        when_unsatisfiable: if one.required { "DoNotSchedule" } else { "ScheduleAnyway" }.to_owned(),
        label_selector: Some(LabelSelector {
            match_labels: Some(names::model_labels(&model.name)),
            ..LabelSelector::default()
        }),
        // Old and new pods of a rollout are spread separately.
        match_label_keys: Some(vec!["pod-template-hash".to_owned()]),
        ..TopologySpreadConstraint::default()
    };
    model.pod.topology_spread.iter().map(rule).collect()
}

fn some<K: Ord, V>(map: BTreeMap<K, V>) -> Option<BTreeMap<K, V>> {
    (!map.is_empty()).then_some(map)
}

fn some_list<T>(list: Vec<T>) -> Option<Vec<T>> {
    (!list.is_empty()).then_some(list)
}
