package workload

import "strings"

// Baggage is what two ztunnels tell each other of who is talking, in the header
// of that name. It is for telemetry; nothing is decided by it.
type Baggage struct {
	Cluster      string
	Namespace    string
	WorkloadName string
	ServiceName  string
	Revision     string
	Region       string
	Zone         string
}

// The keys of baggage. Between the two halves of keyWorkload stands the type of
// the workload.
const (
	keyCluster      = "k8s.cluster.name"
	keyNamespace    = "k8s.namespace.name"
	keyServiceName  = "service.name"
	keyRevision     = "service.version"
	keyRegion       = "cloud.region"
	keyZone         = "cloud.availability_zone"
	keyWorkload     = "k8s."
	keyWorkloadName = ".name"
)

// Baggage returns the header for a workload. It may be empty, and is sent even
// so.
func (w *Workload) Baggage() string {
	var parts []string
	add := func(key, value string) {
		if value != "" && sendable(value) {
			parts = append(parts, key+"="+value)
		}
	}
	l := w.locality()
	add(keyCluster, w.Cluster)
	add(keyNamespace, w.Namespace)
	if w.WorkloadType != "" && sendable(w.WorkloadType) {
		add(keyWorkload+strings.ToLower(w.WorkloadType)+keyWorkloadName, w.WorkloadName)
	}
	add(keyServiceName, w.CanonicalName)
	add(keyRevision, w.CanonicalRevision)
	add(keyRegion, l.Region)
	add(keyZone, l.Zone)
	return strings.Join(parts, ",")
}

// sendable tells whether a value may stand in a header. The file's strings may
// have line breaks in them.
func sendable(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' })
}

// ParseBaggage reads the headers of that name. It ignores what it does not know.
func ParseBaggage(headers []string) Baggage {
	var b Baggage
	for _, h := range headers {
		for part := range strings.SplitSeq(h, ",") {
			key, value, _ := strings.Cut(part, "=")
			value = strings.TrimSpace(value)
			if p := b.member(strings.TrimSpace(key)); p != nil && value != "" {
				*p = value
			}
		}
	}
	return b
}

func (b *Baggage) member(key string) *string {
	switch key {
	case keyCluster:
		return &b.Cluster
	case keyNamespace:
		return &b.Namespace
	case "k8s.deployment.name", "k8s.cronjob.name", "k8s.job.name", "k8s.pod.name":
		return &b.WorkloadName
	case keyServiceName:
		return &b.ServiceName
	case keyRevision:
		return &b.Revision
	case keyRegion:
		return &b.Region
	case keyZone:
		return &b.Zone
	}
	return nil
}
