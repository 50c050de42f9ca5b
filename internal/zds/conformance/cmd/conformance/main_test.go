package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/testmain"
	"ambient-emulator/internal/zds/conformance"
)

func TestMain(m *testing.M) { testmain.Run(m) }

// build runs the literal build commands of the README, and builds this program.
func build(t *testing.T) (bin string) {
	t.Helper()
	bin, err := os.MkdirTemp("/tmp", "conf") // short enough for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(bin) })
	for name, dir := range map[string]string{
		"cni-emulator": "cni-emulator", "ztunnel-emulator": "ztunnel-emulator", "main": "internal/zds/conformance/cmd/conformance",
	} {
		cmd := exec.Command("go", "build", "-o", filepath.Join(bin, name), name+".go")
		cmd.Dir = filepath.Join(testmain.Root(), dir)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("go build %s.go: %v\n%s", name, err, out)
		}
	}
	return bin
}

// Both our halves, as processes, keep every promise.
func TestHalves(t *testing.T) {
	bin := build(t)
	p := func(name string) string { return filepath.Join(bin, name) }
	verb := func(words string) string {
		return fmt.Sprintf("%s %s --namespace {namespace} --control-uds %s", p("cni-emulator"), words, p("control.sock"))
	}
	var both sync.WaitGroup
	both.Go(func() {
		whole(t, len(conformance.ClientPromises()), p("main"), "--strict", "--json", "client:"+p("client.sock"), "--",
			p("ztunnel-emulator"), "--inpod-uds", p("client.sock"))
	})
	both.Go(func() {
		whole(t, len(conformance.ServerPromises()), p("main"), "--strict", "--json",
			"--add", verb("add {name} --netns {netns} --uid {uid} --service-account {service-account}"), "--del", verb("del {name}"),
			"server:"+p("server.sock"), "--",
			p("cni-emulator"), "serve", "--zds-uds", p("server.sock"), "--control-uds", p("control.sock"))
	})
	both.Wait()
}

// whole runs the suite and wants all promises kept.
func whole(t *testing.T, promises int, args ...string) {
	cmd := exec.Command(args[0], args[1:]...)
	var progress bytes.Buffer
	cmd.Stderr = &progress
	out, err := cmd.Output()
	r := new(conformance.Report)
	if jerr := json.Unmarshal(out, r); jerr != nil {
		t.Errorf("%v: %v, %v\n%s\n%s", args, err, jerr, out, &progress)
		return
	}
	for _, res := range r.Results {
		if res.Status != conformance.Kept {
			t.Errorf("%s %s: %s: %s (%s)", r.Target, res.ID, res.Status, res.Why, res.Source)
		}
	}
	if err != nil || len(r.Results) != promises {
		t.Errorf("%s: %v, %d results of %d promises", r.Target, err, len(r.Results), promises)
	}
}

// The words of the call, through the script that people use.
func TestWords(t *testing.T) {
	t.Setenv("CI", "") // nothing is to be installed here
	dir := t.TempDir()
	script := filepath.Join(testmain.Root(), "scripts", "conformance")
	for _, tt := range []struct {
		args string
		code int
		says string
	}{
		{"-h", 0, "client:PATH"},
		{"--flags", 0, "-strict"},
		{"--list", 0, "client hello: the first packet"},
		{"", 2, "client:PATH"},
		{"client:", 2, "client:PATH"},
		{"ztunnel:DIR/x", 2, "client:PATH"},
		{"client:DIR/x --nonsense", 2, "not defined: -nonsense"},
		{"client:DIR/x --", 2, "a command after --"},
		{"server:DIR/x --add true", 2, "--add and --del go together"},
		{"client:DIR/x --only nonsense", 1, `no promise is called ["nonsense"]`},
		{"server:DIR/s --wait 10ms", 1, "is the server started"},
		{"client:DIR/s --wait 10ms", 1, "within 10ms"},
		{"client:DIR/s --wait 500ms -- sh -c echo${IFS}elsewhere;sleep${IFS}9", 1, "last words: elsewhere"},
		{"server:DIR/s -- /bin/false", 1, "exited with status 1"},
	} {
		out, err := exec.Command(script, strings.Fields(strings.ReplaceAll(tt.args, "DIR", dir))...).CombinedOutput()
		code := 0
		if exit := new(exec.ExitError); errors.As(err, &exit) {
			code = exit.ExitCode()
		}
		if code != tt.code || !strings.Contains(string(out), tt.says) {
			t.Errorf("%q: exit %d, want %d and %q: %s", tt.args, code, tt.code, tt.says, out)
		}
	}
}

// SIGINT at the script ends the run and the half that it has started.
func TestInterrupted(t *testing.T) {
	dir := t.TempDir()
	pidFile := filepath.Join(dir, "pid")
	cmd := exec.Command(filepath.Join(testmain.Root(), "scripts", "conformance"), "client:"+dir+"/s", "--",
		"sh", "-c", "echo $$ >"+pidFile+".new; mv "+pidFile+".new "+pidFile+"; exec sleep 100")
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var child int
	for range 1000 {
		if b, err := os.ReadFile(pidFile); err == nil {
			fmt.Sscan(string(b), &child)
			break
		}
		unix.Select(0, nil, nil, nil, &unix.Timeval{Usec: 20000})
	}
	cmd.Process.Signal(unix.SIGINT)
	err := cmd.Wait()
	if exit := new(exec.ExitError); !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(said.String(), "interrupted") {
		t.Errorf("%v: %s", err, &said)
	}
	if child == 0 || unix.Kill(child, 0) != unix.ESRCH {
		t.Errorf("process %d is still there", child)
	}
	if left, _ := os.ReadDir(dir); len(left) != 1 {
		t.Errorf("left behind: %v", left)
	}
}
