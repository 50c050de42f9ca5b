package redirect

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/netns/netnstest"
)

// This kernel has everything; a kernel's refusals are read as what they prove.
func TestKernel(t *testing.T) {
	ns := netnstest.New(t)
	p, err := open(ns)
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	before := state(t, ns)
	all := Config{Mode: TProxy, DNS: true, IPv6: true}.features()
	for _, f := range all {
		if err := f.ask(p); judge(err) != Works {
			t.Errorf("%s: %v", f.name, err)
		}
	}
	same(t, "after", state(t, ns), before)
	nowhere := feature{"a type that there is not", "CONFIG_NOWHERE", try(chain{name: "c", kind: "nosuchtype", hook: "output", jump: "-"}, rule{})}
	if err := nowhere.ask(p); judge(err) != Absent {
		t.Errorf("%s: %v", nowhere.name, err)
	}
	// No kernel has policy rules of that family.
	none := feature{"policy routing of Unix", "CONFIG_UNIX_MULTIPLE_TABLES", func(p *pod) error { _, err := p.links.RuleList(unix.AF_UNIX); return err }}
	if err := none.ask(p); judge(err) != Absent {
		t.Errorf("%s: %v", none.name, err)
	}
	silent := feature{"silence", "CONFIG_SILENCE", func(*pod) error { return unix.ETIMEDOUT }}
	for err, want := range map[error]Answer{nil: Works, fmt.Errorf("x: %w", unix.EOPNOTSUPP): Absent, unix.EPROTONOSUPPORT: Absent, unix.EBUSY: Unknown, errors.New("?"): Unknown} {
		if got := judge(err); got != want {
			t.Errorf("%v: %v", err, got)
		}
	}

	// None of them is left as a number.
	failed := fmt.Errorf("add it: %w", unix.ENOENT)
	for want, needs := range map[string][]feature{
		"add it: no such file or directory, though the kernel has all that is needed":                                                                                      all,
		"add it: no such file or directory: proven absent in this kernel: a type that there is not (CONFIG_NOWHERE), policy routing of Unix (CONFIG_UNIX_MULTIPLE_TABLES)": append([]feature{nowhere, silent, none}, all...),
		"add it: no such file or directory: cannot tell whether this kernel has: silence (connection timed out)":                                                           {silent},
	} {
		if err := p.explain(failed, needs); fmt.Sprint(err) != want || !errors.Is(err, unix.ENOENT) {
			t.Errorf("got  %v\nwant %s", err, want)
		}
	}
	if err := p.explain(ErrLoDown, all); err != ErrLoDown {
		t.Errorf("what has a name already: %v", err)
	}
	if err := lacks(unix.EPERM, "CAP_NET_ADMIN"); !errors.Is(err, ErrCapability) || !strings.Contains(err.Error(), "setcap cap_sys_admin,cap_net_admin+ep /") {
		t.Errorf("got %v", err)
	}
}
