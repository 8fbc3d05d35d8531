package daemon

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"virt-trust/internal/hosttpm"
	"virt-trust/internal/launcher/launchlog"
	"virt-trust/internal/launcher/measure"
	"virt-trust/internal/platform/journal"
	"virt-trust/internal/vtpm/liststore"
)

// launchLog is the launch log of this life of the PCRs. An entry is written
// before the PCR is extended by it. One that a killed virt-trustd left in between
// is the log's last, and is found by the next one, which extends the PCR by it
// then. What is new since boot is on the disk before that; the entry of a VM's
// start follows a moment later (checkSoon), so that no start waits for it:
// whatever loses a page that the kernel has, a power cut or a kernel that dies,
// resets the PCR as well.
type launchLog struct {
	log      *launchlog.Log // nil: to be read again
	file     *os.File
	live     map[string][]byte // what the PCR holds, as far as is known
	standing launchlog.Standing
	problem  string // of a log that does not replay
	told     bool   // that it does not
	// unchecked: the log has grown since it was held against the PCR.
	unchecked bool
}

// maxLaunchLogs is how many logs are kept, this one included.
const maxLaunchLogs = 16

func (g *Guard) launchLogs() string { return filepath.Join(g.dirs.State, "launch-log") }

// runLaunchLog names this boot's log, in memory that ends with the boot: a log
// that was removed is missed.
func (g *Guard) runLaunchLog() string { return filepath.Join(g.dirs.Run, "launch-log") }

// openLaunchLog finds the log of this life of the PCRs, sees to an entry that
// is pending, or begins a new log. Called with launch.mu held.
func (g *Guard) openLaunchLog(ctx context.Context) error {
	l := &g.launch.log
	if l.log != nil {
		return nil
	}
	pcr, err := g.tpm.ReadPCR(ctx, g.cfg.Launcher.PCR)
	if err != nil {
		return g.tpmRefusal(err)
	}
	if err := os.MkdirAll(g.launchLogs(), 0o700); err != nil {
		return err
	}
	names, err := logNames(g.launchLogs())
	if err != nil {
		return err
	}
	gap := ""
	b, err := os.ReadFile(g.runLaunchLog())
	sameBoot := err == nil && strings.TrimSpace(string(b)) == g.bootID
	if len(names) > 0 {
		name := filepath.Join(g.launchLogs(), names[len(names)-1])
		old, torn, err := replay(name)
		switch {
		case err != nil && !errors.Is(err, launchlog.ErrFormat):
			return fmt.Errorf("reading the launch log: %w", err)
		case old.Boot.ID != "" && old.Boot.ID != g.bootID:
		case err != nil && !sameBoot:
		case err != nil:
			gap = name + " was altered: " + err.Error()
		case old.Entries == 0:
			os.Remove(name) // a crash came before its first line
		default:
			switch standing := old.Against(pcr.Values, pcr.ResetCount); {
			case old.Boot.PCR != g.cfg.Launcher.PCR:
				gap = fmt.Sprintf("the launch PCR was %d until now", old.Boot.PCR)
			case standing == launchlog.WasReset && !sameBoot: // a boot after all, such as a container's
			case standing == launchlog.WasReset:
				gap = "the TPM was reset while the host was up"
			default:
				return g.resumeLaunchLog(ctx, name, old, torn, standing, pcr)
			}
		}
	} else if sameBoot {
		gap = "the log of this boot was removed"
	}
	return g.beginLaunchLog(ctx, names, pcr, gap)
}

// resumeLaunchLog goes on with the log of this boot.
func (g *Guard) resumeLaunchLog(ctx context.Context, name string, old *launchlog.Log, torn int, standing launchlog.Standing, pcr hosttpm.PCR) error {
	l := &g.launch.log
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	if torn > 0 { // never extended: that comes after the whole line
		st, err := f.Stat()
		if err == nil {
			err = f.Truncate(st.Size() - int64(torn))
		}
		if err != nil {
			f.Close()
			return err
		}
	}
	if standing == launchlog.Pending {
		line, err := lastLine(f)
		if err == nil {
			err = g.tpm.ExtendPCR(ctx, hosttpm.Extension{PCR: old.Boot.PCR, Digests: launchlog.Digests(line, old.Values), Before: old.Previous, After: old.Values})
		}
		if err != nil {
			f.Close()
			return g.tpmRefusal(err)
		}
		pcr.Values, standing = old.Values, launchlog.Replays
		g.log.Info("the launch log's last entry, which a crash had cut off, is in the PCR now")
	}
	if old.Boot.Gap != "" {
		standing = launchlog.Broken
	}
	if _, err := f.Seek(0, io.SeekEnd); err != nil {
		f.Close()
		return err
	}
	l.close()
	l.log, l.file, l.live = old, f, pcr.Values
	g.stand(standing, old.Boot.Gap)
	return nil
}

// beginLaunchLog begins a log. gap says what is wrong with what was before it in
// this boot; such a log never passes for one that replays.
func (g *Guard) beginLaunchLog(ctx context.Context, names []string, pcr hosttpm.PCR, gap string) error {
	l := &g.launch.log
	number := 1
	if len(names) > 0 {
		fmt.Sscanf(names[len(names)-1], "%d", &number)
		number++
	}
	for len(names) >= maxLaunchLogs {
		if err := os.Remove(filepath.Join(g.launchLogs(), names[0])); err != nil {
			return err
		}
		names = names[1:]
	}
	f, err := os.OpenFile(filepath.Join(g.launchLogs(), fmt.Sprintf("%08d.jsonl", number)), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	l.close()
	l.log, l.file, l.live = &launchlog.Log{}, f, pcr.Values
	err = g.append(ctx, launchlog.Entry{Event: launchlog.EventBoot, Boot: &launchlog.Boot{
		ID: g.bootID, ResetCount: pcr.ResetCount, PCR: g.cfg.Launcher.PCR, Before: launchlog.Hex(pcr.Values), Gap: gap,
	}})
	if err == nil {
		err = errors.Join(f.Sync(), liststore.SyncDir(g.launchLogs()), os.WriteFile(g.runLaunchLog(), []byte(g.bootID+"\n"), 0o600))
	}
	if err != nil {
		l.close()
		return err
	}
	if gap != "" {
		g.stand(launchlog.Broken, gap)
	} else {
		g.stand(launchlog.Replays, "")
	}
	return nil
}

func (l *launchLog) close() {
	if l.file != nil {
		l.file.Close()
	}
	l.log, l.file = nil, nil
}

// append writes an entry and extends the PCR by it. After an error the log is
// read again before the next: only the PCR knows how far it came. Called with
// launch.mu held.
func (g *Guard) append(ctx context.Context, e launchlog.Entry) (err error) {
	l := &g.launch.log
	defer func() {
		if err != nil {
			l.close()
		}
	}()
	e.Time = g.unix()
	line, err := launchlog.Encode(e)
	if err != nil {
		return err
	}
	next := *l.log
	if err := next.Add(line); err != nil {
		return err
	}
	if _, err := l.file.Write(append(line, '\n')); err != nil {
		return fmt.Errorf("writing the launch log: %w", err)
	}
	extended := launchlog.Extended(l.live, line)
	err = g.tpm.ExtendPCR(ctx, hosttpm.Extension{PCR: next.Boot.PCR, Digests: launchlog.Digests(line, l.live), Before: l.live, After: extended})
	if err != nil {
		return g.tpmRefusal(err)
	}
	*l.log, l.live, l.unchecked = next, extended, true
	return nil
}

// logFiles puts files that are new since boot into the log, with one entry.
// Called with launch.mu held.
func (g *Guard) logFiles(ctx context.Context, all []launcher) error {
	if err := g.openLaunchLog(ctx); err != nil {
		return err
	}
	log := g.launch.log.log
	var files []measure.File
	var entry launchlog.Entry
	for _, l := range all {
		if log.Number(l.Path, l.SHA256) == 0 {
			files = append(files, l.File)
			entry.Files = append(entry.Files, launchlog.File{N: len(log.Files) + len(files), Role: l.Role, Path: l.Path, SHA256: hex.EncodeToString(l.SHA256[:]), By: string(l.by)})
		}
	}
	if len(files) == 0 {
		return nil
	}
	for i, v := range measure.Kernel(files) {
		entry.Files[i].IMA, entry.Files[i].Verity = v.IMA, v.Verity
	}
	entry.Event = launchlog.EventFiles
	if err := g.append(ctx, entry); err != nil {
		return err
	}
	return g.launch.log.file.Sync()
}

// logStart puts a VM's start into the log. Called with launch.mu held.
func (g *Guard) logStart(ctx context.Context, s launchlog.Start, all []launcher) error {
	if err := g.logFiles(ctx, all); err != nil { // a log that was begun since prepare has none
		return err
	}
	var digests [][sha256.Size]byte
	s.Launchers = []int{}
	for _, l := range all {
		digests = append(digests, l.SHA256)
		s.Launchers = append(s.Launchers, g.launch.log.log.Number(l.Path, l.SHA256))
	}
	slices.Sort(s.Launchers)
	set := launchlog.Set(digests)
	s.LaunchersSHA256 = hex.EncodeToString(set[:])
	return g.append(ctx, launchlog.Entry{Event: launchlog.EventStart, Start: &s})
}

// stand notes how the log stands, and makes known once that it does not replay.
// Called with launch.mu held.
func (g *Guard) stand(s launchlog.Standing, problem string) {
	l := &g.launch.log
	l.standing, l.problem = s, ""
	if s != launchlog.Broken {
		return
	}
	l.problem = problem
	if problem == "" {
		l.problem = fmt.Sprintf("PCR %d holds another value than the log's entries give: someone else extended it", g.cfg.Launcher.PCR)
	}
	if !l.told {
		l.told = true
		g.report("", "", "launch-log", noted, "", "the launch log does not replay: "+l.problem, journal.LaunchLogBroken)
	}
}

// checkSoon is called every few seconds: what has grown is checked.
func (g *Guard) checkSoon(ctx context.Context) {
	g.launch.mu.Lock()
	todo := g.launch.log.log == nil || g.launch.log.unchecked
	g.launch.mu.Unlock()
	if todo {
		if _, _, err := g.checkLaunchLog(ctx); err != nil {
			g.log.WithError(err).Debug("checking the launch log")
		}
	}
}

// checkLaunchLog holds the log against the PCR as it is, and takes it to the
// disk. It gives what the TPM said, and how long the log was then, in bytes.
// While the TPM is asked VMs may start; where one did, the TPM is asked again.
func (g *Guard) checkLaunchLog(ctx context.Context) (pcr hosttpm.PCR, size int64, err error) {
	g.launch.mu.Lock()
	defer g.launch.mu.Unlock()
	l := &g.launch.log
	if err := g.openLaunchLog(ctx); err != nil {
		return pcr, 0, err
	}
	for try := 0; ; try++ {
		log, entries, file := l.log, l.log.Entries, l.file
		const most = 3 // tries after which VMs wait
		if try < most {
			g.launch.mu.Unlock()
		}
		if e := file.Sync(); e != nil && !errors.Is(e, os.ErrClosed) {
			g.log.WithError(e).Warn("taking the launch log to the disk")
		}
		pcr, err = g.tpm.ReadPCR(ctx, g.cfg.Launcher.PCR)
		if try < most {
			g.launch.mu.Lock()
		}
		if err != nil {
			return pcr, 0, g.tpmRefusal(err)
		}
		if err := g.openLaunchLog(ctx); err != nil {
			return pcr, 0, err
		}
		if l.log == log && log.Entries == entries {
			break
		}
	}
	l.unchecked = false
	switch s := l.log.Against(pcr.Values, pcr.ResetCount); {
	case s == launchlog.WasReset:
		l.close()
		if err := g.openLaunchLog(ctx); err != nil {
			return pcr, 0, err
		}
		pcr.Values, pcr.ResetCount = l.live, l.log.Boot.ResetCount
	case s == launchlog.Replays && l.log.Boot.Gap == "":
		g.stand(s, "")
	default:
		l.live = pcr.Values
		g.stand(launchlog.Broken, l.log.Boot.Gap)
	}
	st, err := l.file.Stat()
	if err != nil {
		return pcr, 0, err
	}
	return pcr, st.Size(), nil
}

// readLaunchLog gives a piece of the log from offset on; none at its end.
func (g *Guard) readLaunchLog(offset uint64) ([]byte, error) {
	const most = 4 << 20
	g.launch.mu.Lock()
	defer g.launch.mu.Unlock()
	if g.launch.log.file == nil {
		return nil, nil
	}
	st, err := g.launch.log.file.Stat()
	if err != nil || offset >= uint64(st.Size()) {
		return nil, err
	}
	piece := make([]byte, min(st.Size()-int64(offset), most))
	n, err := g.launch.log.file.ReadAt(piece, int64(offset))
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return piece[:n], err
}

// logNames gives the logs in a folder, oldest first.
func logNames(dir string) (names []string, err error) {
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		if e.Type().IsRegular() && strings.HasSuffix(e.Name(), ".jsonl") {
			names = append(names, e.Name())
		}
	}
	slices.Sort(names) // numbers of eight digits
	return names, err
}

// replay replays a log file. torn is how many bytes of a cut off line follow.
func replay(name string) (l *launchlog.Log, torn int, err error) {
	l = &launchlog.Log{}
	f, err := os.Open(name)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("%w: it is gone", launchlog.ErrFormat)
		}
		return l, 0, err
	}
	defer f.Close()
	r := bufio.NewReaderSize(f, launchlog.MaxLine+1)
	for {
		line, err := r.ReadSlice('\n')
		if errors.Is(err, io.EOF) {
			return l, len(line), nil
		}
		if errors.Is(err, bufio.ErrBufferFull) {
			return l, 0, fmt.Errorf("%w: a line is too long", launchlog.ErrFormat)
		}
		if err != nil {
			return l, 0, err
		}
		if err := l.Add(line[:len(line)-1]); err != nil {
			return l, 0, err
		}
	}
}

// lastLine gives the last line of a log file that ends with one.
func lastLine(f *os.File) ([]byte, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	b := make([]byte, min(st.Size(), launchlog.MaxLine+2))
	if _, err := f.ReadAt(b, st.Size()-int64(len(b))); err != nil {
		return nil, err
	}
	lines, _ := launchlog.Split(b)
	return lines[len(lines)-1], nil
}
