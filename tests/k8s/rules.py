"""Rules beyond the schemas: references lead to something that exists and agree with the broker's defaults.

Each rule is a function from the documents of one kustomization to its violations.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from catbus.config import Config, load
from catbus.config.loader import VARIABLES
from catbus.config.network_addresses import split_address
from catbus.endpoints.http.routes import ROUTES
from catbus.observability.metric_table import METRICS
from tests.k8s.manifests import Document, find_document, of_kind

HIDDEN = {"auth.secret", "auth.admin_key", "database.url", "database.listen_url"}
"""Settings whose values must not be in a manifest."""

Rule = Callable[[list[Document]], Iterator[str]]

RULES: dict[str, Rule] = {}

EXPECTED = {
    "catbus-secrets": {"database-url", "token-secret", "listen-url"},
    "catbus-tls": {"tls.crt", "tls.key"},
    "catbus-ingress-tls": {"tls.crt", "tls.key"},
    "pgbouncer-auth": {"userlist.txt"},
    "pgbouncer-tls": {"tls.crt", "tls.key"},
}
"""Secrets that the user creates, as `k8s/README.md` describes, with their keys."""

ENUMS = {
    "protocol": {"TCP", "UDP"},
    "policyTypes": {"Ingress", "Egress"},
    "imagePullPolicy": {"Always", "IfNotPresent", "Never"},
    "externalTrafficPolicy": {"Local", "Cluster"},
    "sessionAffinity": {"ClientIP", "None"},
    "pathType": {"Prefix", "Exact", "ImplementationSpecific"},
    "whenUnsatisfiable": {"ScheduleAnyway", "DoNotSchedule"},
    "accessModes": {"ReadWriteOnce", "ReadWriteOncePod", "ReadWriteMany", "ReadOnlyMany"},
    "restartPolicy": {"Always"},
}
"""Allowed values by field, at any place. The schemas accept any text for them."""

SCALING = {
    ("metrics", "type"): {"Resource", "Pods"},
    ("target", "type"): {"Utilization", "AverageValue"},
    ("policies", "type"): {"Pods", "Percent"},
}
"""Allowed values for an autoscaler, by the field's parent and name: its fields are all called `type`."""

TOPOLOGIES = {"kubernetes.io/hostname", "topology.kubernetes.io/zone"}
"""Labels of nodes."""

SERIES = {"process_resident_memory_bytes", "process_cpu_seconds_total"}
SERIES |= {declared.name for declared in METRICS.values() if declared.kind != "histogram"}
SERIES |= {f"{name}_{part}" for name in METRICS.keys() - SERIES for part in ("bucket", "sum", "count")}
"""Names that a query may use. A histogram exists only as its parts."""


def rule(check: Rule) -> Rule:
    RULES[check.__name__] = check
    return check


# Access to documents


def workloads(documents: list[Document]) -> list[Document]:
    return of_kind(documents, "Deployment", "StatefulSet")


def pod_of(workload: Document) -> Document:
    pod: Document = workload["spec"]["template"]
    return pod


def containers(documents: list[Document]) -> Iterator[tuple[Document, Document]]:
    """Each container with its pod."""
    for workload in workloads(documents):
        for container in pod_of(workload)["spec"]["containers"]:
            yield pod_of(workload), container


def catbus_container(documents: list[Document]) -> Document:
    [found] = [container for _, container in containers(documents) if container["name"] == "catbus"]
    return found


def selected(documents: list[Document], labels: dict[str, str]) -> list[Document]:
    """The pods that these labels select."""
    pods = [pod_of(workload) for workload in workloads(documents)]
    return [pod for pod in pods if labels.items() <= pod["metadata"]["labels"].items()]


def ports_of(pod: Document) -> dict[tuple[str | int, str], Document]:
    """Its ports, by name and by number, with the protocol."""
    ports = [port for container in pod["spec"]["containers"] for port in container.get("ports", [])]
    return {(port[key], port.get("protocol", "TCP")): port for port in ports for key in ("name", "containerPort")}


def fields(value: Any, name: str) -> Iterator[Any]:
    """The values of all fields with this name, at any place."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == name:
                yield inner
            yield from fields(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from fields(inner, name)


def name_of(document: Document) -> str:
    return f"{document['kind']}/{document['metadata']['name']}"


# The rules


@rule
def names_are_unique(documents: list[Document]) -> Iterator[str]:
    seen = [name_of(document) for document in documents]
    yield from (f"{name} twice" for name in set(seen) if seen.count(name) > 1)


@rule
def enumerations_have_known_values(documents: list[Document]) -> Iterator[str]:
    for document in documents:
        for field, allowed in ENUMS.items():
            for found in fields(document, field):
                values = found if isinstance(found, list) else [found]
                yield from (f"{name_of(document)}: {field}: {value}" for value in values if value not in allowed)


@rule
def services_have_known_types(documents: list[Document]) -> Iterator[str]:
    for service in of_kind(documents, "Service"):
        kind = service["spec"].get("type", "ClusterIP")
        if kind not in ("ClusterIP", "NodePort", "LoadBalancer"):
            yield f"{name_of(service)}: type {kind}"
        if "externalTrafficPolicy" in service["spec"] and kind == "ClusterIP":
            yield f"{name_of(service)}: externalTrafficPolicy on a type without external traffic"


@rule
def selectors_are_not_empty(documents: list[Document]) -> Iterator[str]:
    """An empty selector selects everything in the namespace, or nothing, depending on the kind."""
    for document in documents:
        selectors = [found for name in ("selector", "podSelector", "labelSelector") for found in fields(document, name)]
        yield from (f"{name_of(document)}: {found}" for found in selectors if not found.get("matchLabels", found))


@rule
def workloads_select_their_own_pods(documents: list[Document]) -> Iterator[str]:
    for workload in workloads(documents):
        labels = workload["spec"]["selector"]["matchLabels"]
        if selected(documents, labels) != [pod_of(workload)]:
            yield f"{name_of(workload)}: {labels}"


@rule
def services_lead_to_existing_ports(documents: list[Document]) -> Iterator[str]:
    for service in of_kind(documents, "Service"):
        pods = selected(documents, service["spec"]["selector"])
        if not pods:
            yield f"{name_of(service)} selects nothing"
        for port in service["spec"]["ports"]:
            target = port.get("targetPort", port["port"]), port.get("protocol", "TCP")
            if any(target not in ports_of(pod) for pod in pods):
                yield f"{name_of(service)}: {target}"


@rule
def topology_spreads_count_their_own_pods(documents: list[Document]) -> Iterator[str]:
    for workload in workloads(documents):
        for spread in pod_of(workload)["spec"].get("topologySpreadConstraints", []):
            if pod_of(workload) not in selected(documents, spread["labelSelector"]["matchLabels"]):
                yield f"{name_of(workload)} counts others: {spread['labelSelector']}"
            if spread["topologyKey"] not in TOPOLOGIES:
                yield f"{name_of(workload)}: no node has {spread['topologyKey']}"


@rule
def references_exist(documents: list[Document]) -> Iterator[str]:
    """Checks accounts, the Service of a StatefulSet, and Secrets outside environments and volumes."""
    there = {name_of(document) for document in documents} | {f"Secret/{name}" for name in EXPECTED}
    for document in documents:
        references = [f"ServiceAccount/{name}" for name in fields(document, "serviceAccountName")]
        if document["kind"] == "StatefulSet":
            references.append(f"Service/{document['spec']['serviceName']}")
        if document["kind"] == "Certificate":
            references.append(f"Secret/{document['spec']['secretName']}")
        if document["kind"] == "Ingress":
            references += [f"Secret/{tls['secretName']}" for tls in document["spec"].get("tls", [])]
        yield from (f"{name_of(document)}: no {name}" for name in references if name not in there)


@rule
def hosts_have_tls(documents: list[Document]) -> Iterator[str]:
    """A token is in the first message, so the connection must be encrypted."""
    for ingress in of_kind(documents, "Ingress"):
        secure = {host for tls in ingress["spec"].get("tls", []) for host in tls["hosts"]}
        hosts = {each.get("host") for each in ingress["spec"]["rules"]}
        yield from (f"{name_of(ingress)}: {host}" for host in hosts ^ secure)
    for ingress in of_kind(documents, "IngressRoute"):
        if not ingress["spec"].get("tls") or ingress["spec"].get("entryPoints") != ["websecure"]:
            yield f"{name_of(ingress)} is open to plain HTTP"


@rule
def ingresses_lead_to_existing_services(documents: list[Document]) -> Iterator[str]:
    ports = {
        (service["metadata"]["name"], port[key])
        for service in of_kind(documents, "Service")
        for port in service["spec"]["ports"]
        for key in ("name", "port")
        if port.get("protocol", "TCP") == "TCP"
    }
    for ingress in of_kind(documents, "Ingress"):
        for path in fields(ingress, "paths"):
            for backend in (each["backend"]["service"] for each in path):
                if not any((backend["name"], port) in ports for port in backend["port"].values()):
                    yield f"{name_of(ingress)}: {backend}"
    for ingress in of_kind(documents, "IngressRoute"):
        for services in fields(ingress, "services"):
            for backend in services:
                if (backend["name"], backend["port"]) not in ports:
                    yield f"{name_of(ingress)}: {backend}"


@rule
def ingresses_forward_only_the_websocket_path(documents: list[Document]) -> Iterator[str]:
    for ingress in of_kind(documents, "Ingress"):
        for paths in fields(ingress, "paths"):
            yield from (f"{name_of(ingress)}: {each['path']}" for each in paths if each["path"] != "/ws")
    for ingress in of_kind(documents, "IngressRoute"):
        for match in fields(ingress, "match"):
            if not re.search(r"&& PathPrefix\(`/ws`\)$", match):
                yield f"{name_of(ingress)}: {match}"


@rule
def budgets_and_policies_select_pods(documents: list[Document]) -> Iterator[str]:
    for document in of_kind(documents, "PodDisruptionBudget", "NetworkPolicy"):
        selector = document["spec"].get("selector") or document["spec"]["podSelector"]
        pods = selected(documents, selector["matchLabels"])
        if not pods:
            yield f"{name_of(document)} selects nothing"
        for rules in fields(document["spec"], "ingress"):
            for port in (port for each in rules for port in each["ports"]):
                if any((port["port"], port.get("protocol", "TCP")) not in ports_of(pod) for pod in pods):
                    yield f"{name_of(document)}: {port}"


@rule
def budgets_permit_draining_a_node(documents: list[Document]) -> Iterator[str]:
    """A budget without `maxUnavailable` permits no eviction, nor does one that keeps every replica."""
    for budget in of_kind(documents, "PodDisruptionBudget"):
        if budget["spec"].get("maxUnavailable") != 1:
            yield f"{name_of(budget)}: {budget['spec']}"


@rule
def network_policies_allow_every_port(documents: list[Document]) -> Iterator[str]:
    for policy in of_kind(documents, "NetworkPolicy"):
        pods = selected(documents, policy["spec"]["podSelector"]["matchLabels"])
        open_ports = [
            ports_of(pod).get((port["port"], port.get("protocol", "TCP")))
            for pod in pods
            for rules in fields(policy["spec"], "ingress")
            for each in rules
            for port in each["ports"]
        ]
        wanted = [port for pod in pods for container in pod["spec"]["containers"] for port in container["ports"]]
        yield from (f"{name_of(policy)}: {port}" for port in wanted if port not in open_ports)
        if "Ingress" not in policy["spec"].get("policyTypes", []):
            yield f"{name_of(policy)} does not limit incoming connections"


@rule
def rollouts_add_a_replica_before_removing_one(documents: list[Document]) -> Iterator[str]:
    strategy = find_document(documents, "Deployment", "catbus")["spec"].get("strategy", {})
    if strategy.get("rollingUpdate") != {"maxSurge": 1, "maxUnavailable": 0}:
        yield f"{strategy}"


@rule
def monitors_find_one_port(documents: list[Document]) -> Iterator[str]:
    for monitor in of_kind(documents, "ServiceMonitor"):
        labels = monitor["spec"]["selector"]["matchLabels"]
        ports = [
            port["name"]
            for service in of_kind(documents, "Service")
            if labels.items() <= service["metadata"].get("labels", {}).items()
            for port in service["spec"]["ports"]
        ]
        for endpoint in monitor["spec"]["endpoints"]:
            if ports.count(endpoint["port"]) != 1:
                yield f"{name_of(monitor)}: {endpoint['port']} is the port of {ports.count(endpoint['port'])} services"
            if endpoint["path"] not in ROUTES:
                yield f"{name_of(monitor)}: {endpoint['path']}"


@rule
def autoscalers_alone_set_the_number_of_replicas(documents: list[Document]) -> Iterator[str]:
    for scaler in of_kind(documents, "HorizontalPodAutoscaler"):
        target = scaler["spec"]["scaleTargetRef"]
        found = [d for d in of_kind(documents, target["kind"]) if d["metadata"]["name"] == target["name"]]
        if not found:
            yield f"{name_of(scaler)}: {target}"
        for workload in found:
            if "replicas" in workload["spec"]:
                yield f"{name_of(workload)} sets its own number of replicas"
            for container in pod_of(workload)["spec"]["containers"]:
                if "cpu" not in container["resources"]["requests"]:
                    yield f"{name_of(workload)} requests no CPU, so it has no utilization"
        for metric in fields(scaler, "metric"):
            if metric["name"] not in METRICS:
                yield f"{name_of(scaler)}: {metric['name']}"


@rule
def autoscalers_have_known_types(documents: list[Document]) -> Iterator[str]:
    for scaler in of_kind(documents, "HorizontalPodAutoscaler"):
        for (place, field), allowed in SCALING.items():
            for found in fields(scaler, place):
                values = [each[field] for each in (found if isinstance(found, list) else [found])]
                yield from (f"{name_of(scaler)}: {place}: {value}" for value in values if value not in allowed)
        for target in fields(scaler, "target"):
            if {"Utilization": "averageUtilization", "AverageValue": "averageValue"}.get(target["type"]) not in target:
                yield f"{name_of(scaler)}: {target}"


@rule
def secrets_and_config_maps_exist(documents: list[Document]) -> Iterator[str]:
    there = dict(EXPECTED)
    for document in of_kind(documents, "Secret", "ConfigMap"):
        there[document["metadata"]["name"]] = set(document.get("data", {}))
    for pod, container in containers(documents):
        for env in container.get("env", []):
            reference = env.get("valueFrom", {}).get("secretKeyRef")
            if reference and reference["key"] not in there.get(reference["name"], ()):
                yield f"{container['name']}: {env['name']}: {reference}"
        volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", [])}
        mounted = {mount["name"]: mount for mount in container.get("volumeMounts", [])}
        claimed = {"data"} if container["name"] == "postgres" else set()
        yield from (f"{container['name']}: no volume {name}" for name in mounted.keys() - volumes.keys() - claimed)
        yield from (f"{container['name']}: {name} is not mounted" for name in volumes.keys() - mounted.keys())
        for volume in volumes.values():
            name = volume.get("secret", {}).get("secretName") or volume.get("configMap", {}).get("name")
            if name not in there:
                yield f"{container['name']}: {volume}"
            elif (key := mounted.get(volume["name"], {}).get("subPath")) and key not in there[name]:
                yield f"{container['name']}: {name} has no {key}"


@rule
def certificates_are_mounted_as_a_directory(documents: list[Document]) -> Iterator[str]:
    """A single mounted file (`subPath`) does not change when the Secret changes."""
    container = catbus_container(documents)
    mounts = {mount["mountPath"]: mount for mount in container.get("volumeMounts", [])}
    for env in container["env"]:
        if env["name"] in ("CATBUS_CERT", "CATBUS_KEY"):
            directory, _, file = env["value"].rpartition("/")
            if "subPath" in mounts.get(directory, {"subPath": ""}) or file not in EXPECTED["catbus-tls"]:
                yield f"{env['name']}: {env['value']}"


@rule
def secrets_are_readable(documents: list[Document]) -> Iterator[str]:
    """The files of a Secret belong to root. Another user needs the pod's group if the mode excludes others."""
    for pod, container in containers(documents):
        user = pod["spec"].get("securityContext", {})
        for volume in pod["spec"].get("volumes", []):
            mode = volume.get("secret", {}).get("defaultMode", 0o644)
            if not mode & 0o004 and not (mode & 0o040 and user.get("fsGroup")):
                yield f"{container['name']}: {volume['name']} has mode {mode:o}"


@rule
def probes_use_routes_of_the_broker(documents: list[Document]) -> Iterator[str]:
    wanted = {"startupProbe": "/health", "livenessProbe": "/health", "readinessProbe": "/ready"}
    container = catbus_container(documents)
    for name, path in wanted.items():
        probe = container.get(name, {}).get("httpGet")
        if probe is None or probe["path"] != path or path not in ROUTES or probe["port"] != "websocket":
            yield f"{name}: {probe}"


@rule
def ports_are_the_brokers_defaults(documents: list[Document]) -> Iterator[str]:
    config = Config()
    wanted = {
        ("webtransport", split_address(config.webtransport.bind[0])[1], "UDP"),
        ("websocket", split_address(config.websocket.bind[0])[1], "TCP"),
    }
    found = {(port["name"], port["containerPort"], port["protocol"]) for port in catbus_container(documents)["ports"]}
    if found != wanted:
        yield f"{found}, not {wanted}"


@rule
def environments_have_only_known_settings(documents: list[Document]) -> Iterator[str]:
    container = catbus_container(documents)
    names = [env["name"] for env in container["env"]]
    yield from (f"the broker does not read {name}" for name in names if name not in VARIABLES)
    yield from (f"{name} twice" for name in set(names) if names.count(name) > 1)
    yield from (f"{name} is missing" for name in {"DATABASE_URL", "CATBUS_SECRET"} - set(names))
    for env in container["env"]:
        if VARIABLES.get(env["name"]) in HIDDEN and "value" in env:
            yield f"{env['name']} is readable in the manifest"


@rule
def images_set_their_own_command(documents: list[Document]) -> Iterator[str]:
    container = catbus_container(documents)
    yield from (f"{name} replaces that of the image" for name in ("command", "args") if name in container)


@rule
def images_have_a_version(documents: list[Document]) -> Iterator[str]:
    for _, container in containers(documents):
        image = container.get("image", "")
        if ":" not in image.rpartition("/")[2]:
            yield f"{container['name']}: {image or 'no image'}"


@rule
def accounts_mount_no_token(documents: list[Document]) -> Iterator[str]:
    for account in of_kind(documents, "ServiceAccount"):
        if account.get("automountServiceAccountToken") is not False:
            yield name_of(account)


@rule
def grace_periods_suffice_to_drain(documents: list[Document]) -> Iterator[str]:
    for pod, container in containers(documents):
        if container["name"] == "catbus":
            drain = load(None, {env["name"]: env["value"] for env in container["env"] if "value" in env}).drain
            [before] = [int(command[-1]) for command in fields(container["lifecycle"]["preStop"], "command")]
            needed = before + drain.delay + drain.window + drain.deadline
            grace = pod["spec"]["terminationGracePeriodSeconds"]
            if grace <= needed:
                yield f"{grace} s of grace for {needed:g} s"


@rule
def containers_have_minimal_privileges(documents: list[Document]) -> Iterator[str]:
    for pod, container in containers(documents):
        name, spec, own = container["name"], pod["spec"], container.get("securityContext", {})
        shared = spec.get("securityContext", {})
        wanted = {
            "runs as root": shared.get("runAsNonRoot") is True and shared.get("runAsUser", 0) > 0,
            "has no seccomp profile": shared.get("seccompProfile") == {"type": "RuntimeDefault"},
            "may gain privileges": own.get("allowPrivilegeEscalation") is False,
            "keeps capabilities": own.get("capabilities") == {"drop": ["ALL"]},
            "has a token": spec.get("automountServiceAccountToken") is False,
            "may write its image": own.get("readOnlyRootFilesystem") is True or name == "postgres",
            "has no limit of memory": "memory" in container.get("resources", {}).get("limits", {}),
            "asks for no resources": {"cpu", "memory"} <= set(container.get("resources", {}).get("requests", {})),
        }
        yield from (f"{name} {text}" for text, good in wanted.items() if not good)


@rule
def expressions_use_existing_metrics(documents: list[Document]) -> Iterator[str]:
    for text in expressions(documents):
        yield from (f"{name}: {text}" for name in metrics_in(text) if name not in SERIES)


def metrics_in(text: str) -> list[str]:
    """The metrics in PromQL: its names, except those of functions, operators, labels and durations."""
    text = re.sub(r"\{[^}]*\}|\[[^]]*\]|\b(?:by|without)\s*\([^)]*\)", " ", text)
    text = re.sub(r"(label_values\(\w+),\s*\w+", r"\1", text)
    names = re.findall(r"\b[a-zA-Z_:][\w:]*\b(?!\s*\()", text)
    return [name for name in names if name not in ("and", "or", "unless")]


def expressions(documents: list[Document]) -> Iterator[str]:
    """All PromQL in alerts and dashboards."""
    for document in of_kind(documents, "PrometheusRule"):
        yield from fields(document, "expr")
    for document in of_kind(documents, "ConfigMap"):
        if document["metadata"].get("labels", {}).get("grafana_dashboard"):
            for text in document["data"].values():
                yield from re.findall(r'"(?:expr|definition)": "((?:[^"\\]|\\.)*)"', text)
