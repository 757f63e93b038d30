// Writes JSON schemas for kubeconform, so that `make lint` needs no schemas from a network: those of Kubernetes' own
// kinds from the OpenAPI document of its module, those of custom resources from their definitions.
//
//	schemas FOLDER SWAGGER.json DEFINITION.yaml...
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"sigs.k8s.io/yaml"
)

type object = map[string]any

const quantity = "io.k8s.apimachinery.pkg.api.resource.Quantity"

func main() {
	if len(os.Args) < 3 {
		fail(fmt.Errorf("usage: schemas FOLDER SWAGGER.json DEFINITION.yaml..."))
	}
	folder := os.Args[1]
	fail(os.MkdirAll(folder, 0o755))
	kubernetesKinds(folder, read(os.Args[2]))
	for _, path := range os.Args[3:] {
		customResources(folder, read(path))
	}
}

// One file for each kind: the definition and those that it refers to.
func kubernetesKinds(folder string, swagger object) {
	definitions := swagger["definitions"].(object)
	for _, definition := range definitions {
		tighten(definition)
	}
	definitions[quantity] = object{"type": []any{"string", "number"}}
	for name, definition := range definitions {
		kinds, _ := definition.(object)["x-kubernetes-group-version-kind"].([]any)
		// Options of requests belong to every group at a time; they are no objects of a manifest.
		if len(kinds) != 1 {
			continue
		}
		kind := kinds[0].(object)
		used := object{}
		collect(definitions, name, used)
		write(folder, text(kind["group"]), text(kind["version"]), text(kind["kind"]),
			object{"$ref": "#/definitions/" + name, "definitions": used})
	}
}

func customResources(folder string, definition object) {
	spec := definition["spec"].(object)
	kind := text(spec["names"].(object)["kind"])
	for _, version := range spec["versions"].([]any) {
		schema := version.(object)["schema"].(object)["openAPIV3Schema"].(object)
		properties := schema["properties"].(object)
		for _, name := range []string{"apiVersion", "kind"} {
			properties[name] = object{"type": "string"}
		}
		tighten(schema)
		properties["metadata"] = object{"type": "object"}
		write(folder, text(spec["group"]), text(version.(object)["name"]), kind, schema)
	}
}

// Makes an OpenAPI schema a JSON schema, and refuses fields that it does not name.
func tighten(value any) {
	switch value := value.(type) {
	case []any:
		for _, element := range value {
			tighten(element)
		}
	case object:
		if properties, ok := value["properties"].(object); ok && value["x-kubernetes-preserve-unknown-fields"] == nil {
			if value["additionalProperties"] == nil && value["type"] == "object" {
				value["additionalProperties"] = false
			}
			for _, property := range properties {
				tighten(property)
			}
		}
		for _, key := range []string{"items", "additionalProperties", "allOf", "anyOf", "oneOf"} {
			tighten(value[key])
		}
		if value["format"] == "int-or-string" || value["x-kubernetes-int-or-string"] == true {
			value["type"] = []any{"string", "integer"}
		}
		if kind, ok := value["type"].(string); ok && value["nullable"] == true {
			value["type"] = []any{kind, "null"}
		}
	}
}

// Adds to used the definition of that name and all that it refers to.
func collect(definitions object, name string, used object) {
	if used[name] != nil {
		return
	}
	used[name] = definitions[name]
	var search func(value any)
	search = func(value any) {
		switch value := value.(type) {
		case []any:
			for _, element := range value {
				search(element)
			}
		case object:
			if reference, ok := value["$ref"].(string); ok {
				collect(definitions, strings.TrimPrefix(reference, "#/definitions/"), used)
			}
			for _, element := range value {
				search(element)
			}
		}
	}
	search(definitions[name])
}

// The name of the file is the one that kubeconform asks for: KIND-GROUP-VERSION.json, the group up to its first dot.
func write(folder, group, version, kind string, schema object) {
	name := kind
	if group != "" {
		name += "-" + strings.Split(group, ".")[0]
	}
	data, err := json.Marshal(schema)
	fail(err)
	fail(os.WriteFile(filepath.Join(folder, strings.ToLower(name+"-"+version)+".json"), data, 0o644))
}

func read(path string) object {
	data, err := os.ReadFile(path)
	fail(err)
	var document object
	if err := yaml.Unmarshal(data, &document); err != nil {
		fail(fmt.Errorf("%s: %w", path, err))
	}
	return document
}

func text(value any) string {
	words, _ := value.(string)
	return words
}

func fail(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}
