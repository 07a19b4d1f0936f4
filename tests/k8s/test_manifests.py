"""The manifests render, satisfy the schemas of the oldest and the newest Kubernetes, and keep the rules."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from urllib.parse import urlsplit

import jsonschema
import kubernetes_validate
import pytest

from catbus.cli.commands.run import check_exposure
from catbus.config import load_with_sources
from catbus.observability.metric_table import METRICS
from tests.k8s import rules
from tests.k8s.manifests import (
    CRDS,
    MANIFESTS,
    ROOT,
    VERSIONS,
    Document,
    find_document,
    kustomizations,
    of_kind,
    render,
    validate,
)
from tests.k8s.rules import RULES, catbus_container, pod_of

README = (MANIFESTS / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("place", kustomizations())
def test_kustomization_satisfies_the_schemas(place: str, version: str) -> None:
    documents = render(place)
    assert documents
    for document in documents:
        validate(document, version)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("place", kustomizations())
def test_kustomization_keeps_the_rules(place: str, rule: str) -> None:
    assert list(RULES[rule](render(place))) == []


# The schemas and the rules find mistakes.


def test_unknown_field_is_invalid() -> None:
    deployment = find_document(render("base"), "Deployment", "catbus")
    pod_of(deployment)["spec"]["containers"][0]["livenesProbe"] = {}
    for version in VERSIONS:
        with pytest.raises(kubernetes_validate.ValidationError):
            validate(deployment, version)


def test_kind_without_a_schema_is_invalid() -> None:
    with pytest.raises(kubernetes_validate.SchemaNotFoundError):
        validate({"apiVersion": "example.com/v1", "kind": "Cat", "metadata": {"name": "x"}}, VERSIONS[0])


@pytest.mark.parametrize("kind", sorted(file.stem for file in CRDS.iterdir()))
def test_schemas_of_custom_resources_reject_unknown_fields(kind: str) -> None:
    [document] = [d for place in kustomizations() for d in of_kind(render(place), kind)]
    validate(document, VERSIONS[0])
    with pytest.raises(jsonschema.ValidationError):
        validate({**document, "spec": {**document["spec"], "unknown": 1}}, VERSIONS[0])


Break = Callable[[list[Document]], object]


def container(documents: list[Document]) -> Document:
    return catbus_container(documents)


def spec(kind: str, name: str = "catbus") -> Callable[[list[Document]], Document]:
    return lambda documents: find_document(documents, kind, name)["spec"]


BROKEN: dict[str, tuple[str, Break]] = {
    "names_are_unique": ("base", lambda d: d.append(d[0])),
    "enumerations_have_known_values": (
        "base",
        lambda d: spec("Service", "catbus-wt")(d)["ports"][0].update(protocol="QUIC"),
    ),
    "services_have_known_types": (
        "aws-nlb",
        lambda d: spec("Service", "catbus-wt-external")(d).update(type="Balancer"),
    ),
    "selectors_are_not_empty": (
        "base",
        lambda d: spec("NetworkPolicy")(d)["podSelector"].update(matchLabels={}),
    ),
    "topology_spreads_count_their_own_pods": (
        "base",
        lambda d: pod_of(find_document(d, "Deployment", "catbus"))["spec"]["topologySpreadConstraints"][0].update(
            topologyKey="kubernetes.io/host"
        ),
    ),
    "references_exist": ("cert-manager", lambda d: spec("Certificate")(d).update(secretName="catbus-cert")),
    "hosts_have_tls": ("ingress", lambda d: spec("Ingress", "catbus-websocket")(d).pop("tls")),
    "budgets_permit_draining_a_node": ("base", lambda d: spec("PodDisruptionBudget")(d).pop("maxUnavailable")),
    "network_policies_allow_every_port": ("base", lambda d: spec("NetworkPolicy")(d)["ingress"][0]["ports"].pop()),
    "rollouts_add_a_replica_before_removing_one": (
        "base",
        lambda d: spec("Deployment")(d)["strategy"]["rollingUpdate"].update(maxUnavailable=1),
    ),
    "autoscalers_have_known_types": (
        "hpa",
        lambda d: spec("HorizontalPodAutoscaler")(d)["metrics"][0]["resource"]["target"].update(type="Usage"),
    ),
    "secrets_are_readable": (
        "base",
        lambda d: pod_of(find_document(d, "Deployment", "catbus"))["spec"]["securityContext"].pop("fsGroup"),
    ),
    "workloads_select_their_own_pods": (
        "base",
        lambda d: pod_of(find_document(d, "Deployment", "catbus"))["metadata"].update(labels={"app": "cat"}),
    ),
    "services_lead_to_existing_ports": (
        "base",
        lambda d: spec("Service", "catbus-ws")(d)["ports"][0].update(targetPort="webtransport"),
    ),
    "ingresses_lead_to_existing_services": (
        "traefik",
        lambda d: spec("IngressRoute", "catbus-websocket")(d)["routes"][0]["services"][0].update(port=80),
    ),
    "ingresses_forward_only_the_websocket_path": (
        "ingress",
        lambda d: spec("Ingress", "catbus-websocket")(d)["rules"][0]["http"]["paths"][0].update(path="/"),
    ),
    "budgets_and_policies_select_pods": (
        "base",
        lambda d: spec("PodDisruptionBudget")(d)["selector"].update(matchLabels={"app": "dog"}),
    ),
    "monitors_find_one_port": (
        "monitoring",
        lambda d: spec("ServiceMonitor")(d)["endpoints"][0].update(port="metrics"),
    ),
    "autoscalers_alone_set_the_number_of_replicas": ("hpa", lambda d: spec("Deployment")(d).update(replicas=3)),
    "secrets_and_config_maps_exist": (
        "base",
        lambda d: container(d)["env"][0]["valueFrom"]["secretKeyRef"].update(key="database_url"),
    ),
    "certificates_are_mounted_as_a_directory": (
        "base",
        lambda d: container(d)["volumeMounts"][0].update(subPath="tls.crt"),
    ),
    "probes_use_routes_of_the_broker": (
        "base",
        lambda d: container(d)["readinessProbe"]["httpGet"].update(path="/health"),
    ),
    "ports_are_the_brokers_defaults": ("base", lambda d: container(d)["ports"][0].update(containerPort=4434)),
    "environments_have_only_known_settings": ("base", lambda d: container(d)["env"][1].update(name="CATBUS_SECRETS")),
    "images_set_their_own_command": ("base", lambda d: container(d).update(args=["run"])),
    "images_have_a_version": ("base", lambda d: container(d).update(image="ghcr.io/your-org/catbus")),
    "accounts_mount_no_token": (
        "base",
        lambda d: find_document(d, "ServiceAccount", "catbus").pop("automountServiceAccountToken"),
    ),
    "grace_periods_suffice_to_drain": (
        "base",
        lambda d: pod_of(find_document(d, "Deployment", "catbus"))["spec"].update(terminationGracePeriodSeconds=25),
    ),
    "containers_have_minimal_privileges": ("dev", lambda d: container(d)["securityContext"].pop("capabilities")),
    "expressions_use_existing_metrics": (
        "monitoring",
        lambda d: spec("PrometheusRule")(d)["groups"][0]["rules"][0].update(expr="catbus_session > 1"),
    ),
}
"""For each rule a kustomization, and a change that breaks the rule."""


@pytest.mark.parametrize("rule", RULES)
def test_rule_finds_its_violation(rule: str) -> None:
    place, change = BROKEN[rule]
    documents = render(place if place == "base" else f"overlays/{place}")
    change(documents)
    assert list(RULES[rule](documents))


def test_schemas_accept_wrong_enumerations() -> None:
    """So there is a rule for them."""
    service = find_document(render("base"), "Service", "catbus-wt")
    service["spec"]["ports"][0]["protocol"] = "SMTP"
    validate(service, VERSIONS[0])


# The deployment guide


def test_base_has_the_documents_of_the_deployment_guide() -> None:
    documents = render("base")
    assert {rules.name_of(document) for document in documents} == {
        "Deployment/catbus",
        "NetworkPolicy/catbus",
        "PodDisruptionBudget/catbus",
        "Service/catbus-ws",
        "Service/catbus-wt",
        "Service/catbus-wt-headless",
        "ServiceAccount/catbus",
    }
    assert spec("Deployment")(documents)["replicas"] == 3
    env = {each["name"]: each.get("value") or each["valueFrom"] for each in container(documents)["env"]}
    assert env == {
        "DATABASE_URL": {"secretKeyRef": {"name": "catbus-secrets", "key": "database-url"}},
        "CATBUS_SECRET": {"secretKeyRef": {"name": "catbus-secrets", "key": "token-secret"}},
        "CATBUS_CERT": "/etc/catbus/tls/tls.crt",
        "CATBUS_KEY": "/etc/catbus/tls/tls.key",
        "RUST_LOG": "catbus=info",
        "CATBUS_TRUSTED_PROXIES": "10.0.0.0/8,172.16.0.0/12,192.168.0.0/16,100.64.0.0/10,fd00::/8",
        "CATBUS_DRAIN_DELAY": "5s",
        "CATBUS_DRAIN_WINDOW": "5s",
        "CATBUS_DRAIN_DEADLINE": "10s",
    }
    [volume] = pod_of(find_document(documents, "Deployment", "catbus"))["spec"]["volumes"]
    assert volume["secret"]["secretName"] == "catbus-tls"


def test_base_has_the_services_of_the_deployment_guide() -> None:
    found = {
        service["metadata"]["name"]: (service["spec"].get("clusterIP"), port["name"], port["port"], port["protocol"])
        for service in of_kind(render("base"), "Service")
        for port in service["spec"]["ports"]
    }
    assert found == {
        "catbus-ws": (None, "websocket", 8080, "TCP"),
        "catbus-wt": (None, "webtransport", 4433, "UDP"),
        "catbus-wt-headless": ("None", "webtransport", 4433, "UDP"),
    }


def test_pooler_has_the_port_of_the_deployment_guide() -> None:
    documents = render("overlays/pgbouncer")
    assert [port["port"] for port in spec("Service", "pgbouncer")(documents)["ports"]] == [6432]
    [config] = of_kind(documents, "ConfigMap")
    lines = config["data"]["pgbouncer.ini"].splitlines()
    assert {"listen_port = 6432", "pool_mode = transaction", "client_tls_sslmode = require"} <= set(lines)
    [pooler] = pod_of(find_document(documents, "Deployment", "pgbouncer"))["spec"]["containers"]
    assert [port["containerPort"] for port in pooler["ports"]] == [6432]
    mounts = {mount["mountPath"] for mount in pooler["volumeMounts"]}
    files = {path for line in lines for path in re.findall(r"= (/\S+)", line)} | {pooler["command"][1]}
    assert all(mounts & {path, path.rpartition("/")[0]} for path in files)
    env = {each["name"]: each["valueFrom"] for each in container(documents)["env"] if "valueFrom" in each}
    assert env["CATBUS_LISTEN_URL"] == {"secretKeyRef": {"name": "catbus-secrets", "key": "listen-url"}}


DEV_SECRET = "development-secret-of-the-dev-overlay"


def test_dev_overlay_starts_with_its_public_secret_and_its_own_database() -> None:
    documents = render("overlays/dev")
    secrets = {
        (secret["metadata"]["name"], key): base64.b64decode(value).decode()
        for secret in of_kind(documents, "Secret")
        for key, value in secret["data"].items()
    }

    def environment(container: Document) -> dict[str, str]:
        keys = {env["name"]: env.get("valueFrom", {}).get("secretKeyRef") for env in container["env"]}
        plain = {env["name"]: env["value"] for env in container["env"] if "value" in env}
        return plain | {name: secrets[key["name"], key["key"]] for name, key in keys.items() if key}

    reading = load_with_sources(None, environment(container(documents)))
    check_exposure(reading.config, reading.sources)
    assert reading.config.auth.secrets == (DEV_SECRET,)
    assert f"--secret {DEV_SECRET} " in README
    url = urlsplit(reading.config.database.url)
    [postgres] = pod_of(find_document(documents, "StatefulSet", "postgres"))["spec"]["containers"]
    assert environment(postgres) == {
        "POSTGRES_USER": url.username,
        "POSTGRES_PASSWORD": url.password,
        "POSTGRES_DB": url.path.removeprefix("/"),
    }
    [port] = spec("Service", str(url.hostname))(documents)["ports"]
    [opened] = postgres["ports"]
    assert (port["port"], opened["containerPort"], port["targetPort"]) == (url.port, 5432, opened["name"])


def test_metrics_are_found_in_promql() -> None:
    text = 'histogram_quantile(0.9, sum by (le) (rate(a_bucket{b="c"}[5m]))) / time() > 7 * process_x'
    assert rules.metrics_in(text) == ["a_bucket", "process_x"]
    assert rules.metrics_in("label_values(catbus_build_info, namespace)") == ["catbus_build_info"]


def test_overlays_have_the_settings_of_the_deployment_guide() -> None:
    route = spec("IngressRoute", "catbus-websocket")(render("overlays/traefik"))
    assert route["routes"][0]["match"] == "Host(`catbus.example.com`) && PathPrefix(`/ws`)"
    external = find_document(render("overlays/aws-nlb"), "Service", "catbus-wt-external")
    assert external["metadata"]["annotations"]["service.beta.kubernetes.io/aws-load-balancer-type"] == "nlb"
    assert external["spec"]["externalTrafficPolicy"] == "Local"
    affinity = spec("Service", "catbus-ws")(render("overlays/session-affinity"))
    assert affinity["sessionAffinity"] == "ClientIP"
    assert affinity["sessionAffinityConfig"] == {"clientIP": {"timeoutSeconds": 3600}}
    scaler = spec("HorizontalPodAutoscaler")(render("overlays/hpa"))
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (2, 10)
    assert scaler["metrics"][0]["resource"]["target"]["averageUtilization"] == 70
    assert [m["pods"]["metric"]["name"] for m in scaler["metrics"][1:]] == ["catbus_sessions"]
    names = {
        document["metadata"]["annotations"]["external-dns.alpha.kubernetes.io/hostname"]
        for document in of_kind(render("overlays/dns-split"), "Ingress", "Service")
        if "external-dns.alpha.kubernetes.io/hostname" in document["metadata"].get("annotations", {})
    }
    assert names == {"catbus.example.com", "catbus-direct.example.com"}
    assert len(spec("Deployment")(render("overlays/dev"))["template"]["spec"]["containers"]) == 1
    assert spec("Deployment")(render("overlays/dev"))["replicas"] == 1


def test_dashboard_panels_have_expressions() -> None:
    [config] = of_kind(render("overlays/monitoring"), "ConfigMap")
    dashboard = json.loads(config["data"]["catbus.json"])
    assert dashboard["title"] == "Catbus"
    assert all(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    assert len(list(rules.expressions(render("overlays/monitoring")))) > 30


def test_alerts_have_a_summary_and_a_severity() -> None:
    groups = spec("PrometheusRule")(render("overlays/monitoring"))["groups"]
    for alert in (rule for group in groups for rule in group["rules"]):
        assert alert["alert"].startswith("Catbus")
        assert alert["annotations"]["summary"].endswith(".")
        assert alert["labels"]["severity"] in ("critical", "warning")


def test_alerts_distinguish_missing_messages_from_an_unreachable_database() -> None:
    [group] = spec("PrometheusRule")(render("overlays/monitoring"))["groups"]
    alerts = {rule["alert"]: " ".join(rule["expr"].split()) for rule in group["rules"]}
    assert alerts["CatbusMessagesMissing"] == "max by (namespace) (catbus_log_missing_messages) > 0"
    # A replica is degraded in both cases. Its log is available only if messages are missing.
    assert alerts["CatbusDatabaseUnreachable"] == (
        'max by (namespace, pod) (catbus_state{state="degraded"}) == 1 '
        "and min by (namespace, pod) (catbus_log_available) == 0"
    )


def test_alerts_on_consumers_name_the_consumer() -> None:
    [group] = spec("PrometheusRule")(render("overlays/monitoring"))["groups"]
    found = {rule["alert"]: rule for rule in group["rules"] if "catbus_consumer" in rule["expr"]}
    assert set(found) == {"CatbusConsumerLagging", "CatbusConsumerOvertaken", "CatbusDeadLetters"}
    for rule in found.values():
        # All replicas report the same consumers.
        assert "by (namespace, consumer)" in rule["expr"]
        assert "{{ $labels.consumer }}" in rule["annotations"]["summary"]
        for name in rules.metrics_in(rule["expr"]):
            assert METRICS[name].labels == ("consumer",)
    # A consumer that catches up has a long lag that shrinks.
    assert "delta(catbus_consumer_lag_seconds[10m])" in found["CatbusConsumerLagging"]["expr"]


def test_readme_explains_every_overlay_and_every_secret() -> None:
    for place in kustomizations()[1:]:
        assert f"`{place.removeprefix('overlays/')}`" in README
    for name, keys in rules.EXPECTED.items():
        assert name in README
        assert all(key in README for key in keys)


def test_manifests_contain_no_local_paths_and_no_secrets_outside_dev() -> None:
    for file in MANIFESTS.rglob("*"):
        if file.is_file():
            text = file.read_text(encoding="utf-8")
            assert str(ROOT) not in text
            if "dev" not in file.parts and file.suffix in (".yaml", ".ini"):
                assert not re.search(r"password[=:]\s*\S", text), file
