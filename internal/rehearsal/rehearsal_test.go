package main

import (
	"context"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"ambient-emulator/internal/testmain"
)

func TestMain(m *testing.M) { testmain.Run(m) }

func TestUpgradeLosesNothing(t *testing.T) {
	r := run(t, upgrade)
	if r.failed() || r.served < int64(5*r.pods) {
		t.Errorf("\n%v", r)
	}
	t.Logf("\n%v", r)
}

func TestCrashIsOvercome(t *testing.T) {
	r := run(t, crash)
	if r.served <= r.before {
		t.Errorf("\n%v", r)
	}
	t.Logf("\n%v", r)
}

func run(t *testing.T, f func(context.Context, *world) (report, error)) report {
	t.Helper()
	bin := t.TempDir()
	for _, name := range []string{"cni-emulator", "ztunnel-emulator"} {
		cmd := exec.Command("go", "build", "-o", filepath.Join(bin, name), name+".go")
		cmd.Dir = filepath.Join(testmain.Root(), name)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("go build %s.go: %v\n%s", name, err, out)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	w, err := newWorld(ctx, 100, filepath.Join(bin, "cni-emulator"), filepath.Join(bin, "ztunnel-emulator"), t.Output())
	defer w.close()
	if err != nil {
		t.Fatal(err)
	}
	r, err := f(ctx, w)
	if err != nil {
		t.Fatal(err)
	}
	return r
}
