//! Authorization at a registry: Basic, or a token that its token service gives for one repository.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use http::HeaderMap;
use http::header::WWW_AUTHENTICATE;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::error::StoreError;
use crate::http::{Http, Query, encode_component, invalid_answer};
use crate::settings::Environment;

pub(super) const FIX: &str =
    "mount a Secret of the type kubernetes.io/dockerconfigjson, or set SOURCE_USERNAME and SOURCE_PASSWORD";

/// Who asks.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Login {
    Password {
        user: String,
        password: String,
    },
    /// A refresh token, which the token service exchanges.
    IdentityToken(String),
}

/// What a registry asks for in `WWW-Authenticate`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
}

#[derive(Deserialize)]
struct DockerConfig {
    #[serde(default)]
    auths: BTreeMap<String, DockerAuth>,
}

#[derive(Deserialize)]
struct DockerAuth {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
}

#[derive(Deserialize)]
struct RegistryToken {
    token: Option<String>,
    access_token: Option<String>,
}

/// The value of `Authorization` for a user.
pub(super) fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", BASE64_STANDARD.encode(format!("{user}:{password}")))
}

/// The login for a registry, by its host: from the mounted Secret, variables, or a file of a container
/// engine.
pub(super) fn login(environment: &Environment, registry: &str) -> Result<Option<Login>, StoreError> {
    if let Some(user) = environment.get("SOURCE_USERNAME") {
        let password = environment.get("SOURCE_PASSWORD").unwrap_or_default();
        return Ok(Some(Login::Password { user, password }));
    }
    let of_secret = environment
        .secret_file(".dockerconfigjson")
        .or_else(|| environment.secret_file("config.json"))
        .or_else(|| environment.get("REGISTRY_AUTH_FILE").map(PathBuf::from))
        .or_else(|| environment.get("DOCKER_CONFIG").map(|folder| PathBuf::from(folder).join("config.json")));
    let Some(file) = of_secret else { return Ok(None) };
    let wrong = |why: String| StoreError::Credentials { name: file.display().to_string(), why };
    let content = std::fs::read(&file).map_err(|error| wrong(error.to_string()))?;
    login_in(&content, registry).map_err(wrong)
}

fn login_in(content: &[u8], registry: &str) -> Result<Option<Login>, String> {
    let config: DockerConfig = serde_json::from_slice(content).map_err(|error| error.to_string())?;
    // Written as `host`, `https://host` or `https://host/v1/`.
    let host = |key: &str| {
        let key = key.trim_start_matches("https://").trim_start_matches("http://");
        key.split('/').next().unwrap_or_default().to_owned()
    };
    let is_docker = |host: &str| matches!(host, "docker.io" | "index.docker.io" | "registry-1.docker.io");
    let is_same = |key: &str| host(key) == registry || is_docker(&host(key)) && is_docker(registry);
    let Some((_, auth)) = config.auths.into_iter().find(|(key, _)| is_same(key)) else { return Ok(None) };
    if let Some(token) = auth.identitytoken.filter(|token| !token.is_empty()) {
        return Ok(Some(Login::IdentityToken(token)));
    }
    if let (Some(user), Some(password)) = (auth.username, auth.password) {
        return Ok(Some(Login::Password { user, password }));
    }
    let Some(auth) = auth.auth else {
        return Err(format!("it has no auth for {registry} (credential helpers do not work in a pod)"));
    };
    let decoded = BASE64_STANDARD.decode(auth).ok().and_then(|bytes| String::from_utf8(bytes).ok());
    let pair = decoded.as_deref().and_then(|text| text.split_once(':'));
    match pair {
        Some((user, password)) => {
            Ok(Some(Login::Password { user: user.to_owned(), password: password.to_owned() }))
        }
        None => Err(format!("the auth of {registry} is no base64 of user:password")),
    }
}

/// The first challenge that can be met.
pub(super) fn challenge(headers: &HeaderMap) -> Option<Challenge> {
    headers.get_all(WWW_AUTHENTICATE).iter().find_map(|value| parse(value.to_str().ok()?))
}

fn parse(text: &str) -> Option<Challenge> {
    let (scheme, mut rest) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
    if scheme.eq_ignore_ascii_case("basic") {
        return Some(Challenge::Basic);
    }
    if !scheme.eq_ignore_ascii_case("bearer") {
        return None;
    }
    let mut values = BTreeMap::new();
    while let Some((name, after)) = rest.split_once('=') {
        let name = name.trim_matches([',', ' ']).to_ascii_lowercase();
        let (value, left) = match after.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"')?,
            None => after.split_once(',').unwrap_or((after, "")),
        };
        values.insert(name, value.to_owned());
        rest = left;
    }
    Some(Challenge::Bearer {
        realm: values.remove("realm")?,
        service: values.remove("service"),
        scope: values.remove("scope"),
    })
}

/// The value of `Authorization` that meets a challenge; none where there is no login and the registry wants
/// one.
pub(super) async fn authorize(
    http: &Http,
    challenge: &Challenge,
    login: Option<&Login>,
    default_scope: &str,
) -> Result<Option<String>, StoreError> {
    let (realm, service, scope) = match (challenge, login) {
        (Challenge::Basic, Some(Login::Password { user, password })) => {
            return Ok(Some(basic(user, password)));
        }
        (Challenge::Basic, _) => return Ok(None),
        (Challenge::Bearer { realm, service, scope }, _) => (realm, service, scope),
    };
    let mut form = format!("scope={}", encode_component(scope.as_deref().unwrap_or(default_scope)));
    if let Some(service) = service {
        form.push_str(&format!("&service={}", encode_component(service)));
    }
    let what = "a token of the registry";
    let query = match login {
        Some(Login::IdentityToken(token)) => {
            let token = encode_component(token);
            form.push_str(&format!("&grant_type=refresh_token&client_id=trustformers&refresh_token={token}"));
            Query::get(realm, what, FIX)?.post("application/x-www-form-urlencoded", form)?
        }
        login => {
            let joint = if realm.contains('?') { '&' } else { '?' };
            let query = Query::get(&format!("{realm}{joint}{form}"), what, FIX)?;
            match login {
                Some(Login::Password { user, password }) => {
                    query.header("authorization", &basic(user, password))?
                }
                _ => query,
            }
        }
    };
    let body = http.describe(&query).await?;
    let answer: RegistryToken = serde_json::from_slice(&body)
        .map_err(|error| invalid_answer(&query, &error.to_string(), "a registry's token service"))?;
    let token = answer.token.or(answer.access_token);
    let token =
        token.ok_or_else(|| invalid_answer(&query, "it holds no token", "a registry's token service"))?;
    Ok(Some(format!("Bearer {token}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_read_in_every_form() {
        let bearer =
            parse(r#"Bearer realm="https://auth.x/token?a=b",service="x, y",scope="repository:a/b:pull""#);
        let expected = Challenge::Bearer {
            realm: "https://auth.x/token?a=b".to_owned(),
            service: Some("x, y".to_owned()),
            scope: Some("repository:a/b:pull".to_owned()),
        };
        assert_eq!(bearer, Some(expected));
        assert_eq!(parse(r#"basic realm="x""#), Some(Challenge::Basic));
        assert_eq!(parse("Negotiate"), None);
        assert_eq!(parse("Bearer service=x"), None, "a token cannot be asked for without a realm");
    }

    #[test]
    fn a_login_is_found_by_the_host_of_its_key() {
        let auth = BASE64_STANDARD.encode("u:p:q");
        let config = format!(
            r#"{{"auths": {{"https://index.docker.io/v1/": {{"auth": "{auth}"}}, "r:5000": {{"username": "a", "password": "b"}}, "x": {{}}}}}}"#
        );
        let find = |registry| login_in(config.as_bytes(), registry);
        let password = |user: &str, password: &str| {
            Some(Login::Password { user: user.to_owned(), password: password.to_owned() })
        };
        assert!(find("docker.io").unwrap() == password("u", "p:q"));
        assert!(find("r:5000").unwrap() == password("a", "b"));
        assert!(find("r").unwrap().is_none());
        assert!(find("x").is_err());
    }
}
