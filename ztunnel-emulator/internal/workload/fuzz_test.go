package workload

import (
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"strings"
	"testing"
)

// dump is all that a state shows.
func dump(t *testing.T, s *State) string {
	t.Helper()
	b, err := json.Marshal([]any{s.Workloads(), s.Services(), s.Policies(), s.Staged(), s.Warnings()})
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// FuzzParse: no file panics; an error is a *FileError with a line of the file;
// what is accepted is accepted again, as the same, and can be asked anything.
func FuzzParse(f *testing.F) {
	example, err := os.ReadFile("testdata/example.yaml")
	if err != nil {
		f.Fatal(err)
	}
	for _, s := range []string{string(example), balanced("", "", "a", "", "b", ", hostname: b"), "{}", "workloads: &a [*a]", workloadWith("locality: {region: a}"), matching("{principals: [!Exact x]}")} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		s, err := Parse([]byte(text))
		if err != nil {
			var fe *FileError
			if !errors.As(err, &fe) || fe.Line < 1 || fe.Line > strings.Count(text, "\n")+strings.Count(text, "\r")+strings.Count(text, "\u0085")+strings.Count(text, "\u2028")+strings.Count(text, "\u2029")+2 {
				t.Fatalf("%#v", err)
			}
			return
		}
		again, err := Parse([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		if one, two := dump(t, s), dump(t, again); one != two {
			t.Fatalf("got %s\nthen %s", one, two)
		}
		for _, w := range s.Workloads() {
			w.Baggage()
			for _, svc := range s.Services() {
				for _, vip := range svc.VIPs {
					dst := netip.AddrPortFrom(vip.IP, 80)
					s.Route(Request{Source: w, Client: vip.IP, Dst: dst, Network: vip.Network})
					s.InboundTarget(w, vip.Network, vip.IP, svc.Hostname+":80")
					s.InboundTarget(w, vip.Network, vip.IP, dst.String())
				}
			}
			s.Authorize(w, fromAlice)
			s.Authorize(w, Peer{})
		}
	})
}

// FuzzParseBaggage: no header panics, and what was read survives being sent.
func FuzzParseBaggage(f *testing.F) {
	f.Add("k8s.cluster.name=lab,k8s.pod.name=alice", "service.name=a")
	f.Add("=,=", " , ;=")
	f.Fuzz(func(t *testing.T, one, two string) {
		b := ParseBaggage([]string{one, two})
		w := Workload{
			Cluster: b.Cluster, Namespace: b.Namespace, WorkloadName: b.WorkloadName, WorkloadType: "pod",
			CanonicalName: b.ServiceName, CanonicalRevision: b.Revision, Locality: &Locality{b.Region, b.Zone, ""},
		}
		again := ParseBaggage([]string{w.Baggage()})
		for _, v := range [][2]string{
			{b.Cluster, again.Cluster},
			{b.Namespace, again.Namespace},
			{b.WorkloadName, again.WorkloadName},
			{b.ServiceName, again.ServiceName},
			{b.Revision, again.Revision},
			{b.Region, again.Region},
			{b.Zone, again.Zone},
		} {
			if v[0] != v[1] && sendable(v[0]) {
				t.Fatalf("%+v, then %+v", b, again)
			}
		}
	})
}

// FuzzAuthority: no authority panics, and what is accepted is ip:port or
// host:port with nothing around it.
func FuzzAuthority(f *testing.F) {
	for _, s := range []string{"10.0.0.1:80", "[fd00::1]:80", "a.b:80", "user@a:80", "[::ffff:10.0.0.1]:1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		a, err := parseAuthority(s)
		switch {
		case err != nil:
		case a.host == "" && !a.addr.IsValid(), a.host != "" && a.addr.IsValid():
			t.Fatalf("%+v", a)
		case a.addr.IsValid():
			if again, err := parseAuthority(a.addr.String()); err != nil || again != a {
				t.Fatalf("%+v, then %+v, %v", a, again, err)
			}
		case strings.ContainsAny(a.host, " /@:[]\r\n\x00"):
			t.Fatalf("%+v", a)
		}
	})
}
