{{/* Image of one program: call with (dict "root" $ "program" "operator"). */}}
{{- define "trustformers.image" -}}
{{ .root.Values.image.registry }}/trustformers-{{ .program }}:{{ .root.Values.image.tag | default .root.Chart.AppVersion }}
{{- end }}

{{/* Labels that select a component's pods. They must never change: selectors are immutable. */}}
{{- define "trustformers.selector" -}}
app.kubernetes.io/name: trustformers
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* All labels of a component's objects. */}}
{{- define "trustformers.labels" -}}
{{ include "trustformers.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: trustformers
{{- end }}

{{/* Security context of every pod of the release: it runs one program and nothing else. */}}
{{- define "trustformers.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "trustformers.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* URL of the gateway for callers. */}}
{{- define "trustformers.gatewayUrl" -}}
{{ .Values.gateway.url | default (printf "http://trustformers-gateway.%s.svc:%v" .Release.Namespace .Values.gateway.service.httpPort) }}
{{- end }}
