package workload

import "testing"

func TestBaggage(t *testing.T) {
	full := Workload{
		Cluster: "lab", Namespace: "demo", WorkloadName: "alice", WorkloadType: "Deployment", CanonicalName: "alice", CanonicalRevision: "v1",
		Locality: &Locality{"r", "z", "s"},
	}
	const want = "k8s.cluster.name=lab,k8s.namespace.name=demo,k8s.deployment.name=alice,service.name=alice,service.version=v1,cloud.region=r,cloud.availability_zone=z"
	for _, c := range []struct {
		w    Workload
		want string
	}{
		{full, want},
		{Workload{}, ""},
		{Workload{Namespace: "demo", WorkloadName: "nameless type"}, "k8s.namespace.name=demo"},
		{Workload{WorkloadType: "pod"}, ""},
		{Workload{WorkloadType: "job", WorkloadName: "a", Cluster: "no\r\nbreak", CanonicalName: "nö"}, "k8s.job.name=a"},
	} {
		if got := c.w.Baggage(); got != c.want {
			t.Errorf("got %s\nwant %s", got, c.want)
		}
	}
	if got, want := ParseBaggage([]string{want}), (Baggage{"lab", "demo", "alice", "alice", "v1", "r", "z"}); got != want {
		t.Errorf("%+v; want %+v", got, want)
	}
}

func TestParseBaggage(t *testing.T) {
	for _, c := range []struct {
		headers []string
		want    Baggage
	}{
		{nil, Baggage{}},
		{[]string{""}, Baggage{}},
		{[]string{"k8s.cluster.name=a", "k8s.namespace.name=b,service.name=c"}, Baggage{Cluster: "a", Namespace: "b", ServiceName: "c"}},
		{[]string{"k8s.pod.name=a"}, Baggage{WorkloadName: "a"}},
		{[]string{"k8s.job.name=a"}, Baggage{WorkloadName: "a"}},
		{[]string{"k8s.cronjob.name=a"}, Baggage{WorkloadName: "a"}},
		{[]string{"k8s.deployment.name=a"}, Baggage{WorkloadName: "a"}},
		{[]string{"k8s.statefulset.name=a,x=y,z,=,,=q"}, Baggage{}},
		{[]string{"k8s.cluster.name=,service.name=c,service.version"}, Baggage{ServiceName: "c"}},
		{[]string{" service.name = a , service.version=\tb"}, Baggage{ServiceName: "a", Revision: "b"}},
		{[]string{"SERVICE.NAME=a"}, Baggage{}},
	} {
		if got := ParseBaggage(c.headers); got != c.want {
			t.Errorf("%q: %+v; want %+v", c.headers, got, c.want)
		}
	}
}
