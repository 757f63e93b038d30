//! Names of fields in the words of a protocol, for errors of the server of models, which knows them by the
//! names of this server's own routes.

use crate::error::ApiError;

/// A field with two names.
#[derive(Debug)]
pub(crate) struct FieldName {
    /// The one that the server of models knows.
    pub(crate) own: &'static str,
    /// The one of the protocol.
    pub(crate) protocol: &'static str,
}

/// The error with the field, or the one that it stands in, under its name in the protocol.
pub(crate) fn in_protocol(error: ApiError, names: &[FieldName]) -> ApiError {
    let ApiError::InvalidRequest { field: Some(field), message } = &error else { return error };
    let renamed = names.iter().find_map(|FieldName { own, protocol }| {
        let rest = field.strip_prefix(own).filter(|rest| rest.is_empty() || rest.starts_with(['.', '[']))?;
        Some(format!("{protocol}{rest}"))
    });
    let Some(renamed) = renamed else { return error };
    let message = match message.strip_prefix(field.as_str()) {
        Some(rest) => format!("{renamed}{rest}"),
        None => message.clone(),
    };
    ApiError::InvalidRequest { field: Some(renamed), message }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_has_the_protocols_name_in_its_errors() {
        const NAMES: &[FieldName] = &[
            FieldName { own: "stop", protocol: "stop_sequences" },
            FieldName { own: "response_format", protocol: "text.format" },
        ];
        for (field, expected) in [
            ("stop", "stop_sequences: is wrong"),
            ("response_format.schema", "text.format.schema: is wrong"),
            ("stop_token_ids", "stop_token_ids: is wrong"),
        ] {
            let error = in_protocol(ApiError::field(field, "is wrong"), NAMES);
            assert_eq!(error.to_string(), expected);
            let name = expected.split(':').next().map(str::to_owned);
            assert!(matches!(error, ApiError::InvalidRequest { field, .. } if field == name));
        }
        let other = ApiError::Internal { message: "stop".into() };
        assert_eq!(in_protocol(other.clone(), NAMES), other);
    }
}
