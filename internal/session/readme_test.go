package session

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"ambient-emulator/internal/testmain"
)

// Every command in the README is one that runs somewhere: in the session that
// LOG.md records, in a script here, or in CI.
func TestReadmeCommandsRun(t *testing.T) {
	ran := read(t, "LOG.md") + read(t, ".ci/run")
	for _, script := range scripts(t) {
		ran += read(t, script)
	}
	ran = strings.ReplaceAll(ran, "sudo ", "")
	commands := regexp.MustCompile(`(?m)^\$ (.*)$`).FindAllStringSubmatch(read(t, "README.md"), -1)
	if len(commands) < 10 {
		t.Errorf("only %d commands found", len(commands))
	}
	for _, c := range commands {
		command := strings.ReplaceAll(c[1], "sudo ", "")
		// Scripts here have the programs on the path and the socket at hand.
		short := strings.NewReplacer("./ztunnel-emulator/", "", "./cni-emulator/", "", "/tmp/zt.sock", "zt.sock").Replace(command)
		if !strings.Contains(ran, command) && !strings.Contains(ran, short) {
			t.Errorf("no run of %q", command)
		}
	}
}

// Every error that the README explains is one that a session provokes.
func TestReadmeErrorsAreReal(t *testing.T) {
	seen := read(t, "LOG.md") + read(t, "ztunnel-emulator/internal/inpod/crowd_test.go") + read(t, "internal/handoff/handoff_test.go")
	for _, script := range scripts(t) {
		seen += read(t, script)
	}
	// Scripts hold patterns, and double a quote.
	seen = strings.NewReplacer(`\?`, "?", `\+`, "+", "''", "'").Replace(seen)
	_, table, ok := strings.Cut(read(t, "README.md"), "| it says |")
	if !ok {
		t.Fatal("no table of errors")
	}
	rows := regexp.MustCompile("(?m)^\\| `([^`]+)`").FindAllStringSubmatch(table, -1)
	if len(rows) < 10 {
		t.Errorf("only %d errors found", len(rows))
	}
	for _, row := range rows {
		if !strings.Contains(seen, row[1]) {
			t.Errorf("nobody provokes %q", row[1])
		}
	}
}

// The lines of code that the README walks through are lines of the code.
func TestReadmeCodeIsReal(t *testing.T) {
	code := read(t, "internal/netns/do.go") + read(t, "internal/fdpass/fdpass.go")
	blocks := regexp.MustCompile("(?s)```go\n(.*?)```").FindAllStringSubmatch(read(t, "README.md"), -1)
	if len(blocks) == 0 {
		t.Error("no code found")
	}
	for _, b := range blocks {
		for line := range strings.Lines(b[1]) {
			if !strings.Contains(code, strings.TrimSpace(line)) {
				t.Errorf("not in the code: %s", line)
			}
		}
	}
}

func scripts(t *testing.T) []string {
	t.Helper()
	paths, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(paths) == 0 {
		t.Fatal("no scripts", err)
	}
	for i := range paths {
		paths[i] = "internal/session/" + paths[i]
	}
	return paths
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(testmain.Root(), path))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
