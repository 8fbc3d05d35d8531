package lab

import (
	"bufio"
	"os"
	"path/filepath"
	"strings"
)

// cgroupDirs are the folders of a host's own cgroup, one per hierarchy (there
// is more than one where cgroup v1 is still mounted). Without a cgroup of its
// own two hosts would share one, and the systemd of one kill the other's
// services. cpuset is left out: a new cpuset takes no process until it is
// configured, and no host uses it.
func cgroupDirs(name string) []string {
	mounts := map[string]string{} // "" is the unified hierarchy, else a controller
	f, err := os.Open("/proc/self/mounts")
	if err != nil {
		return nil
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		m := strings.Fields(s.Text())
		if len(m) < 4 {
			continue
		}
		switch m[2] {
		case "cgroup2":
			mounts[""] = m[1]
		case "cgroup":
			for _, opt := range strings.Split(m[3], ",") {
				mounts[opt] = m[1]
			}
		}
	}
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil
	}
	var dirs []string
	for _, line := range strings.Split(strings.TrimSpace(string(own)), "\n") {
		part := strings.SplitN(line, ":", 3)
		if len(part) != 3 || strings.Contains(part[1], "cpuset") {
			continue
		}
		controller, _, _ := strings.Cut(part[1], ",")
		if mount, ok := mounts[controller]; ok {
			dirs = append(dirs, filepath.Join(mount, part[2], "virt-trust-lab-"+name))
		}
	}
	return dirs
}

// makeCgroups creates a host's cgroups and gives those that could be made.
func makeCgroups(name string) []string {
	var made []string
	for _, dir := range cgroupDirs(name) {
		if os.MkdirAll(dir, 0o755) == nil {
			made = append(made, dir)
		}
	}
	return made
}

// removeCgroups removes a host's cgroups with all below them, which works as
// soon as their processes are gone.
func removeCgroups(name string) {
	for _, dir := range cgroupDirs(name) {
		var all []string
		filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				all = append(all, path)
			}
			return nil
		})
		for i := len(all) - 1; i >= 0; i-- {
			os.Remove(all[i])
		}
	}
}
