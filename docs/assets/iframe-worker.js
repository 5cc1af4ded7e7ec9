/* Pages that are opened from a folder may not start a worker, which the search needs: there its script runs in a
   hidden frame instead. */
(function () {
  "use strict";
  if (location.protocol !== "file:") return;

  class FrameWorker extends EventTarget {
    constructor(script) {
      super();
      const frame = document.createElement("iframe");
      const heard = [];
      frame.hidden = true;
      (document.body || document.documentElement).append(frame);
      const room = frame.contentWindow;
      room.addEventListener = (kind, listener) => { if (kind === "message") heard.push(listener); };
      room.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      this.frame = frame;
      this.tell = new Promise((resolve, reject) => {
        const element = room.document.createElement("script");
        element.src = new URL(script, location.href).href;
        element.onload = () => resolve((data) => heard.forEach((listener) => listener({ data })));
        element.onerror = () => reject(new Error("cannot load " + element.src));
        room.document.head.append(element);
      });
    }

    postMessage(data) {
      this.tell.then((tell) => tell(data));
    }

    terminate() {
      this.frame.remove();
    }

    set onmessage(listener) {
      this.addEventListener("message", listener);
    }
  }

  window.Worker = FrameWorker;
})();
