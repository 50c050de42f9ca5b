package netns_test

import (
	"os/exec"
	"strings"
	"testing"
)

// What people come to read stands on the standard library and x/sys/unix alone.
func TestHeartImports(t *testing.T) {
	const module = "ambient-emulator/"
	for _, pkg := range []string{"netns", "fdpass", "handoff"} {
		for _, dep := range deps(t, module+"internal/"+pkg) {
			switch {
			case dep == "golang.org/x/sys/unix", !strings.Contains(strings.Split(dep, "/")[0], ".") && !strings.HasPrefix(dep, module):
			case dep == module+"internal/netns", dep == module+"internal/fdpass", dep == module+"internal/handoff":
			default:
				t.Errorf("%s imports %s", pkg, dep)
			}
		}
	}
}

// The agent starts for every pod, and these two make it slow.
func TestAgentLinksNoHTTP(t *testing.T) {
	for _, dep := range deps(t, "ambient-emulator/cni-emulator") {
		if dep == "net/http" || strings.Contains(dep, "prometheus") {
			t.Errorf("cni-emulator links %s", dep)
		}
	}
}

// The halves meet on the wire only, and what tests have in common stays with them.
func TestHalvesAreApart(t *testing.T) {
	for half, other := range map[string]string{"cni-emulator": "ztunnel-emulator", "ztunnel-emulator": "cni-emulator"} {
		for _, dep := range deps(t, "ambient-emulator/"+half) {
			if strings.HasPrefix(dep, "ambient-emulator/"+other) {
				t.Errorf("%s imports %s", half, dep)
			}
			if strings.HasSuffix(dep, "/testmain") || strings.HasSuffix(dep, "test") && strings.HasPrefix(dep, "ambient-emulator/") {
				t.Errorf("%s links %s, which is for tests", half, dep)
			}
		}
	}
}

func deps(t *testing.T, pkg string) []string {
	t.Helper()
	out, err := exec.Command("go", "list", "-deps", pkg).Output()
	if err != nil {
		t.Fatalf("go list -deps %s: %v", pkg, err)
	}
	return strings.Fields(string(out))
}
