//! Keys for S3, by the ways and names that AWS's own tools use: variables, a role of the pod's ServiceAccount
//! (web identity), EKS pod identity, a credentials file, the instance's role.

use std::time::Duration;

use jiff::Timestamp;
use serde::Deserialize;
use tokio::sync::Mutex;
use tokio::time::timeout;

use super::sigv4::AwsKeys;
use crate::error::StoreError;
use crate::http::{Http, Query, encode_component, invalid_answer};
use crate::settings::Environment;

pub(super) const FIX: &str =
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the pod's ServiceAccount a role";
/// Keys are fetched anew this long before they end, so that none ends within a request.
const RENEW_BEFORE_S: i64 = 300;
/// The instance's own address answers at once, or there is none.
const INSTANCE_TIMEOUT: Duration = Duration::from_secs(2);
const INSTANCE_ENDPOINT: &str = "http://169.254.169.254";

/// Finds keys, and keeps them until they end.
#[derive(Debug)]
pub(super) struct AwsCredentials {
    http: Http,
    environment: Environment,
    region: String,
    /// Whether the server may be one of AWS, so that the instance's role counts there.
    is_aws: bool,
    cached: Mutex<Option<CachedKeys>>,
}

#[derive(Debug, Clone)]
struct CachedKeys {
    /// None: requests are not signed.
    keys: Option<AwsKeys>,
    expires: Option<Timestamp>,
}

#[derive(Deserialize)]
struct RoleAnswer {
    #[serde(rename = "AssumeRoleWithWebIdentityResult")]
    result: RoleResult,
}

#[derive(Deserialize)]
struct RoleResult {
    #[serde(rename = "Credentials")]
    credentials: RoleKeys,
}

/// Keys of a role, as the token service and the endpoints of pods and instances write them.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct RoleKeys {
    access_key_id: String,
    secret_access_key: String,
    #[serde(alias = "Token")]
    session_token: String,
    expiration: Option<String>,
}

impl AwsCredentials {
    pub(super) fn new(http: Http, environment: Environment, region: String, is_aws: bool) -> Self {
        Self { http, environment, region, is_aws, cached: Mutex::default() }
    }

    /// The keys to sign with; none where there are none, for buckets that everybody may read.
    pub(super) async fn keys(&self) -> Result<Option<AwsKeys>, StoreError> {
        let mut cached = self.cached.lock().await;
        if let Some(found) = &*cached {
            let ends = |at: &Timestamp| at.as_second() < Timestamp::now().as_second() + RENEW_BEFORE_S;
            if !found.expires.as_ref().is_some_and(ends) {
                return Ok(found.keys.clone());
            }
        }
        let found = self.find().await?;
        let keys = found.keys.clone();
        *cached = Some(found);
        Ok(keys)
    }

    async fn find(&self) -> Result<CachedKeys, StoreError> {
        if let Some(keys) = self.of_variables() {
            return Ok(CachedKeys { keys: Some(keys), expires: None });
        }
        if let (Some(file), Some(role)) =
            (self.environment.get("AWS_WEB_IDENTITY_TOKEN_FILE"), self.environment.get("AWS_ROLE_ARN"))
        {
            return self.of_web_identity(&file, &role).await;
        }
        if let Some(address) = self.environment.get("AWS_CONTAINER_CREDENTIALS_FULL_URI") {
            return self.of_container(&address).await;
        }
        if let Some(keys) = self.of_file()? {
            return Ok(CachedKeys { keys: Some(keys), expires: None });
        }
        let is_off = self.environment.get("AWS_EC2_METADATA_DISABLED").is_some_and(|off| off == "true");
        if self.is_aws
            && !is_off
            && let Ok(Ok(found)) = timeout(INSTANCE_TIMEOUT, self.of_instance()).await
        {
            return Ok(found);
        }
        Ok(CachedKeys { keys: None, expires: None })
    }

    fn of_variables(&self) -> Option<AwsKeys> {
        Some(AwsKeys {
            access_key_id: self.environment.get("AWS_ACCESS_KEY_ID")?,
            secret_access_key: self.environment.get("AWS_SECRET_ACCESS_KEY")?,
            session_token: self.environment.get("AWS_SESSION_TOKEN"),
        })
    }

    async fn of_web_identity(&self, file: &str, role: &str) -> Result<CachedKeys, StoreError> {
        let token = read_token("AWS_WEB_IDENTITY_TOKEN_FILE", file)?;
        let endpoint = self.environment.endpoint(&["AWS_ENDPOINT_URL_STS"]);
        let endpoint = endpoint.unwrap_or_else(|| format!("https://sts.{}.amazonaws.com", self.region));
        let form = format!(
            "Action=AssumeRoleWithWebIdentity&Version=2011-06-15&RoleArn={}&RoleSessionName=trustformers&WebIdentityToken={}",
            encode_component(role),
            encode_component(&token)
        );
        let query = Query::get(&format!("{endpoint}/"), format!("keys of the role {role}"), FIX)?;
        let query = query.post("application/x-www-form-urlencoded", form)?;
        let body = self.http.describe(&query).await?;
        let answer: RoleAnswer = quick_xml::de::from_reader(&*body)
            .map_err(|error| invalid_answer(&query, &error.to_string(), "AWS's token service"))?;
        Ok(answer.result.credentials.into())
    }

    async fn of_container(&self, address: &str) -> Result<CachedKeys, StoreError> {
        let query = Query::get(address, "keys of the pod's identity", FIX)?;
        let token = match self.environment.get("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE") {
            Some(file) => Some(read_token("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", &file)?),
            None => self.environment.get("AWS_CONTAINER_AUTHORIZATION_TOKEN"),
        };
        let query = match token {
            Some(token) => query.header("authorization", &token)?,
            None => query,
        };
        self.role_keys(&query).await
    }

    async fn of_instance(&self) -> Result<CachedKeys, StoreError> {
        let endpoint = self.environment.endpoint(&["AWS_EC2_METADATA_SERVICE_ENDPOINT"]);
        let endpoint = endpoint.unwrap_or_else(|| INSTANCE_ENDPOINT.to_owned());
        let what = "keys of the instance's role";
        let mut ask = Query::get(&format!("{endpoint}/latest/api/token"), what, FIX)?
            .header("x-aws-ec2-metadata-token-ttl-seconds", "21600")?;
        *ask.request.method_mut() = http::Method::PUT;
        let token = text(&ask, &self.http.describe(&ask).await?)?;
        let get = |path: &str| {
            let address = format!("{endpoint}/latest/meta-data/iam/security-credentials/{path}");
            Query::get(&address, what, FIX)?.header("x-aws-ec2-metadata-token", &token)
        };
        let roles = get("")?;
        let roles = text(&roles, &self.http.describe(&roles).await?)?;
        let role = roles.lines().next().unwrap_or_default().trim().to_owned();
        self.role_keys(&get(&role)?).await
    }

    async fn role_keys(&self, query: &Query) -> Result<CachedKeys, StoreError> {
        let body = self.http.describe(query).await?;
        let keys: RoleKeys = serde_json::from_slice(&body)
            .map_err(|error| invalid_answer(query, &error.to_string(), "AWS's endpoint for credentials"))?;
        Ok(keys.into())
    }

    /// The keys of a profile in the file that AWS's tools write.
    fn of_file(&self) -> Result<Option<AwsKeys>, StoreError> {
        let stated = self.environment.get("AWS_SHARED_CREDENTIALS_FILE");
        let of_secret = self.environment.secret_file("credentials").map(|path| path.display().to_string());
        let Some(file) = stated.or(of_secret) else { return Ok(None) };
        let wrong = |why: String| StoreError::Credentials { name: file.clone(), why };
        let content = std::fs::read_to_string(&file).map_err(|error| wrong(error.to_string()))?;
        let profile = self.environment.get("AWS_PROFILE").unwrap_or_else(|| "default".to_owned());
        keys_of_profile(&content, &profile).map(Some).ok_or_else(|| {
            wrong(format!("the profile {profile:?} has no aws_access_key_id and aws_secret_access_key"))
        })
    }
}

impl From<RoleKeys> for CachedKeys {
    fn from(keys: RoleKeys) -> Self {
        Self {
            keys: Some(AwsKeys {
                access_key_id: keys.access_key_id,
                secret_access_key: keys.secret_access_key,
                session_token: Some(keys.session_token),
            }),
            expires: keys.expiration.and_then(|at| at.parse().ok()),
        }
    }
}

/// A token that the cluster mounts and renews: read at each use.
pub(super) fn read_token(variable: &str, file: &str) -> Result<String, StoreError> {
    let read = std::fs::read_to_string(file);
    read.map(|token| token.trim().to_owned()).map_err(|error| StoreError::Credentials {
        name: variable.to_owned(),
        why: format!("{file} cannot be read: {error}"),
    })
}

fn text(query: &Query, body: &[u8]) -> Result<String, StoreError> {
    let text = std::str::from_utf8(body);
    text.map(|text| text.trim().to_owned())
        .map_err(|_| invalid_answer(query, "it is no text", "AWS's endpoint for credentials"))
}

fn keys_of_profile(content: &str, profile: &str) -> Option<AwsKeys> {
    let header = format!("[{profile}]");
    let section = content.lines().map(str::trim).skip_while(|line| *line != header).skip(1);
    let lines: Vec<&str> = section.take_while(|line| !line.starts_with('[')).collect();
    let value = |name: &str| {
        let mut pairs = lines.iter().filter_map(|line| line.split_once('='));
        pairs.find(|(key, _)| key.trim() == name).map(|(_, value)| value.trim().to_owned())
    };
    Some(AwsKeys {
        access_key_id: value("aws_access_key_id")?,
        secret_access_key: value("aws_secret_access_key")?,
        session_token: value("aws_session_token"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_has_its_own_keys() {
        let content =
            "[default]\naws_access_key_id = A\naws_secret_access_key=B=\n\n[other]\naws_access_key_id=C\n";
        let keys = keys_of_profile(content, "default").unwrap();
        assert_eq!((keys.access_key_id.as_str(), keys.secret_access_key.as_str()), ("A", "B="));
        assert_eq!(keys_of_profile(content, "other"), None);
        assert_eq!(keys_of_profile(content, "none"), None);
    }
}
