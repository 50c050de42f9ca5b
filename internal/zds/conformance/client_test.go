package conformance

import "testing"

// faultsOfClients: each promise of a ztunnel, and the faults that have to break it.
var faultsOfClients = map[string][]string{
	"hello":                 {"hello", "talks"},
	"idle":                  {"talks", "impatient"},
	"add":                   {"no-listeners", "ack-bytes", "double-ack"},
	"add-wildcard":          {"loopback"},
	"add-1024":              {"small-buffer"},
	"add-empty-info":        {"needs-name"},
	"add-repeat":            {"restarts"},
	"order":                 {"swapped", "double-ack"},
	"keep-unknown":          {"keep-known"},
	"keep-wrong-field":      {"any-field"},
	"del-unknown":           {"del-known"},
	"del-before-snapshot":   {"del-early", "no-reconcile"},
	"del-after-snapshot":    {"del-ignored"},
	"del-wrong-field":       {"any-field"},
	"readd":                 {"del-late"},
	"replace":               {"replace-ignored", "replace-leaves"},
	"disconnected":          {"drops-on-end", "reconciles-early"},
	"reconcile":             {"no-reconcile", "reconciles-early"},
	"reconnect-in-snapshot": {"set-survives"},
	"orderings":             {"no-reconcile", "del-early", "del-ignored", "replace-leaves", "keep-known"},
	"start-failed":          {"start-class", "start-drops", "start-partial"},
	"start-not-a-netns":     {"judges-early"},
	"start-retry":           {"no-retry", "retries-at-once", "snapshot-unpends"},
	"start-retry-again":     {"retries-once"},
	"pending-del":           {"pending-deaf"},
	"pending-moved":         {"pending-stays"},
	"pending-reconnect":     {"pending-survives"},
	"redial":                {"gives-up", "slow-redial"},
	"redial-calm":           {"tight"},
	"read-unknown-member":   {"reads-anything", "read-class", "read-stays", "read-exits", "slow-redial"},
	"read-no-payload":       {"reads-anything"},
	"read-hello":            {"reads-anything"},
	"read-garbage":          {"reads-anything"},
	"read-truncated":        {"reads-anything"},
	"read-add-0":            {"reads-anything"},
	"read-add-2":            {"reads-anything"},
	"read-add-3":            {"reads-anything"},
	"read-del-1":            {"reads-anything"},
	"read-keep-1":           {"reads-anything"},
	"read-snapshot-1":       {"reads-anything"},
	"read-oversize-keep":    {"reads-anything"},
	"read-oversize-add":     {"reads-anything"},
	"read-oversize-garbage": {"reads-anything"},
	"read-empty":            {"empty-answers"},
	"nack-size":             {"long-nack"},
	"descriptors-refused":   {"leaks-refused"},
	"descriptors-cut":       {"leaks-cut"},
	"descriptors-repeat":    {"leaks-repeat"},
	"descriptors-del":       {"leaks-del"},
	"exit-no-info":          {"process-class", "process-cause", "process-stays", "exits-2"},
	"exit-keep-late":        {"process-class", "process-cause", "process-stays", "exits-2"},
	"exit-second-snapshot":  {"process-class", "process-cause", "process-stays", "exits-2"},
}

func fakeClient(fault string) func(dir string) Options {
	return func(dir string) Options {
		return Options{Path: dir + "/zds", Command: fake("fake-ztunnel", dir+"/zds", fault)}
	}
}

// A ztunnel without a fault keeps every promise.
func TestFaithfulClient(t *testing.T) {
	faithful(t, Client, fakeClient(""), ClientPromises())
}

// And no promise is kept by a ztunnel that has the fault it is about.
func TestFaultyClients(t *testing.T) {
	faulty(t, Client, fakeClient, ClientPromises(), faultsOfClients)
}
