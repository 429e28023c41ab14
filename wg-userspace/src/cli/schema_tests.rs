//! `docs/show.schema.json` describes what `tidegate show --json` prints, and so do the files beside it for other
//! commands.

use std::path::Path;

use schemars::{JsonSchema, generate::SchemaSettings};
use serde_json::Value;

use super::{
    nat::NatShown,
    report::{DataPath, Interface, Nic, Quiesced, Report, Steering},
    trace::TraceReport,
    troubles::Trouble,
};

/// Set to write the file anew.
const RENEW: &str = "TIDEGATE_RENEW_SCHEMA";

fn schema<T: JsonSchema>() -> Value {
    let settings = SchemaSettings::draft2020_12().for_serialize();
    let schema = settings.into_generator().into_root_schema_for::<T>();
    serde_json::to_value(schema).unwrap()
}

#[test]
fn the_schemas_in_the_repository_are_those_of_the_types() {
    for (name, schema) in [
        ("show", schema::<Report>()),
        ("show-nat", schema::<NatShown>()),
        ("trace", schema::<TraceReport>()),
    ] {
        let file = format!("docs/{name}.schema.json");
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(&file);
        let text = format!("{}\n", serde_json::to_string_pretty(&schema).unwrap());
        if std::env::var_os(RENEW).is_some() {
            std::fs::write(&path, &text).unwrap();
        }
        let written = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            written == text,
            "{file} is not what the types say; write it anew by\n    \
             {RENEW}=1 cargo test -p wg-userspace --lib schema"
        );
    }
}

#[test]
fn what_is_printed_of_nat_and_of_packets_has_the_fields_of_its_schema() {
    let fits = |printed: Value, schema: Value| {
        assert_eq!(schema["$schema"], "https://json-schema.org/draft/2020-12/schema");
        assert_fits(&printed, &schema, &schema);
    };
    fits(serde_json::to_value(NatShown::full()).unwrap(), schema::<NatShown>());
    fits(serde_json::to_value(TraceReport::full()).unwrap(), schema::<TraceReport>());
    fits(serde_json::to_value(TraceReport::default()).unwrap(), schema::<TraceReport>());
}

#[test]
fn what_is_printed_has_the_fields_of_the_schema_and_no_others() {
    let lines = format!(
        "private_key={}\nlisten_port=1\npublic_key={}\npreshared_key={}\nendpoint=192.0.2.1:1\n\
         allowed_ip=10.0.0.0/8\nlast_handshake_time_sec=1\npersistent_keepalive_interval=25\n",
        "48".repeat(32),
        "01".repeat(32),
        "22".repeat(32)
    );
    let mut interface = Interface::parse("wg0", lines.lines(), true).unwrap();
    interface.data_path = Some(DataPath {
        nics: vec![Nic::default()],
        quiesced: Some(Quiesced::default()),
        tun_steering: Some(Steering::default()),
        ..DataPath::default()
    });
    interface.troubles.push(Trouble::default());
    interface.peers[0].troubles.push(Trouble::default());
    let printed = serde_json::to_value(Report { interfaces: vec![interface] }).unwrap();
    let schema = schema::<Report>();
    assert_eq!(schema["$schema"], "https://json-schema.org/draft/2020-12/schema");
    assert_fits(&printed, &schema, &schema);
}

/// A small part of JSON Schema: references, alternatives, words, fields, items.
fn assert_fits(value: &Value, schema: &Value, root: &Value) {
    if let Some(reference) = schema.get("$ref").and_then(Value::as_str) {
        let target = root.pointer(reference.strip_prefix('#').unwrap()).unwrap();
        return assert_fits(value, target, root);
    }
    if let Some(any) = schema.get("anyOf").and_then(Value::as_array) {
        let of_value = any.iter().find(|schema| (schema["type"] == "null") == value.is_null());
        return assert_fits(value, of_value.unwrap(), root);
    }
    if let Some(words) = schema.get("oneOf").and_then(Value::as_array) {
        assert!(words.iter().any(|word| &word["const"] == value), "{value} is not as {schema}");
        return;
    }
    match value {
        Value::Object(fields) if schema.get("properties").is_some() => {
            for (name, value) in fields {
                let field = schema["properties"].get(name);
                assert_fits(value, field.unwrap_or_else(|| panic!("{name} in {schema}")), root);
            }
            for name in schema["required"].as_array().into_iter().flatten() {
                assert!(fields.contains_key(name.as_str().unwrap()), "{name} in {fields:?}");
            }
        }
        Value::Array(items) => {
            items.iter().for_each(|item| assert_fits(item, &schema["items"], root));
        }
        _ => {
            let kind = match value {
                Value::Null => "null",
                Value::Bool(_) => "boolean",
                Value::Number(_) => "integer",
                Value::String(_) => "string",
                Value::Array(_) | Value::Object(_) => "object",
            };
            let types = match &schema["type"] {
                Value::Array(types) => types.clone(),
                one => vec![one.clone()],
            };
            assert!(types.iter().any(|one| one == kind), "{value} is not as {schema}");
        }
    }
}
