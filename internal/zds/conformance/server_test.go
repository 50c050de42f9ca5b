package conformance

import (
	"strings"
	"testing"
)

// faultsOfServers: each promise of an agent, and the faults that have to break it.
var faultsOfServers = map[string][]string{
	"waits-for-hello":       {"eager"},
	"snapshot":              {"no-info", "no-account", "swaps-names", "unknown-field", "two-descriptors", "no-descriptor", "not-a-netns", "snapshot-twice", "snapshot-forgets"},
	"one-outstanding":       {"no-wait"},
	"idle":                  {"chats", "idle-ends"},
	"nack-in-snapshot":      {"nack-ends-snapshot"},
	"hello-version":         {"judges-version"},
	"hello-silent":          {"patient", "impatient"},
	"hello-garbage":         {"any-answer"},
	"hello-oversize":        {"any-answer"},
	"ack-silent":            {"patient", "impatient"},
	"ack-garbage":           {"any-answer"},
	"ack-oversize":          {"any-answer"},
	"ack-1024":              {"small-buffer"},
	"unsolicited":           {"no-probe"},
	"reconnect-in-snapshot": {"snapshot-once"},
	"descriptors":           {"leaks"},
	"add":                   {"swaps-names", "two-descriptors"},
	"add-nacked":            {"nack-ends"},
	"add-nacked-words":      {"mute"},
	"add-waits":             {"no-wait"},
	"add-in-snapshot":       {"add-lost"},
	"del":                   {"del-with-fd", "del-field"},
	"del-nobody":            {"del-needs-one", "cache-forgets-nothing"},
	"two-add-newest":        {"add-all", "add-oldest"},
	"two-del-all":           {"del-newest", "del-oldest"},
	"two-newest-leaves":     {"never-forgets"},
	"late-ack":              {"patient", "patient-update"},
	"update-garbage":        {"any-answer"},
}

func fakeServer(fault string) func(dir string) Options {
	return func(dir string) Options {
		verb := func(v string) string {
			return strings.Join(fake("fake-verb", dir+"/control", v, "{uid} {name} {namespace} {service-account} {netns}"), " ")
		}
		return Options{
			Path: dir + "/zds", Command: fake("fake-agent", dir+"/zds", dir+"/control", fault),
			Add: verb("add"), Del: verb("del"),
		}
	}
}

// An agent without a fault keeps every promise.
func TestFaithfulServer(t *testing.T) {
	faithful(t, Server, fakeServer(""), ServerPromises())
}

// And no promise is kept by an agent that has the fault it is about.
func TestFaultyServers(t *testing.T) {
	faulty(t, Server, fakeServer, ServerPromises(), faultsOfServers)
}

// Without hooks and without pods there is still something to try.
func TestServerWithoutHooks(t *testing.T) {
	o := fakeServer("")(shortDir(t))
	o.Add, o.Del = "", ""
	o.Only = []string{"snapshot", "one-outstanding", "hello-garbage", "nack-in-snapshot", "two-*"}
	r, err := Server(t.Context(), o)
	if err != nil || r.Count(Kept) != 3 || r.Count(NotTried) != 4 || r.Count(Broken) != 0 {
		t.Errorf("%+v, %v", r, err)
	}
}
